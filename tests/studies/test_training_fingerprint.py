import json

import pytest
import torch
from images import make_backbone, make_model, make_stream, make_trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, TQDMProgressBar
from torch import nn

from lightning_odem import TaskClassifier
from lightning_odem.studies.training_fingerprint import describe_task, describe_training, fingerprint, hash_tensors


def described(seed=0, model=None, trainer=None, task=None):
    return fingerprint(
        describe_training(model or make_model(), task or make_stream()["a"], trainer or make_trainer(), seed)
    )


def test_the_same_training_has_the_same_fingerprint():
    assert described() == described()


def test_a_progress_bar_changes_nothing():
    assert described(trainer=make_trainer(TQDMProgressBar(), enable_progress_bar=True)) == described()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model": make_model(lr=0.1)},
        {"trainer": make_trainer(max_epochs=3)},
        {"trainer": make_trainer(gradient_clip_val=1.0)},
        {"trainer": make_trainer(GradientAccumulationScheduler({0: 2}))},
        {"task": make_stream()["b"]},
        {"task": make_stream(batch_size=6)["a"]},
        {"task": make_stream(seed=5)["a"]},
        {"task": make_stream(train_transform=torch.nn.Identity())["a"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_training_changes_the_fingerprint(change):
    assert described(**change) != described()


def test_another_source_of_a_base_class_changes_the_fingerprint():
    def derived(base):
        return type("Model", (base,), {})(make_backbone(), mean=[0.5] * 3, std=[0.25] * 3)

    def once():
        class Steps(TaskClassifier):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx)

        return derived(Steps)

    def twice():
        class Steps(TaskClassifier):
            def training_step(self, batch, batch_idx):
                return 2 * super().training_step(batch, batch_idx)

        return derived(Steps)

    assert described(model=once()) == described(model=once()) != described(model=twice())


def test_another_source_of_a_submodule_changes_the_fingerprint():
    def plain():
        class Activation(nn.Module):
            def forward(self, x):
                return x.tanh()

        return Activation()

    def steep():
        class Activation(nn.Module):
            def forward(self, x):
                return (2 * x).tanh()

        return Activation()

    def model(activation):
        backbone = make_backbone()
        backbone[2] = activation
        return TaskClassifier(backbone, mean=[0.5] * 3, std=[0.25] * 3)

    assert described(model=model(plain())) == described(model=model(plain())) != described(model=model(steep()))


def test_another_source_of_the_augmentation_changes_the_description_of_a_task():
    def mirrored():
        class Augmentation(nn.Module):
            def forward(self, image):
                return image.flip(-1)

        return nn.Sequential(Augmentation())

    def upside_down():
        class Augmentation(nn.Module):
            def forward(self, image):
                return image.flip(-2)

        return nn.Sequential(Augmentation())

    def task(transform):
        return describe_task(make_stream(train_transform=transform)["a"])

    assert task(mirrored()) == task(mirrored()) != task(upside_down())


def test_the_source_of_a_function_that_augments_is_in_the_description_of_a_task():
    def mirrored(image):
        return image.flip(-1)

    assert "image.flip(-1)" in json.dumps(describe_task(make_stream(train_transform=mirrored)["a"]))


def test_other_weights_of_the_base_model_change_the_fingerprint():
    model = make_model()
    with torch.no_grad():
        model.backbone[1].weight[0, 0] += 1e-6
    assert described(model=model) != described()


def test_other_training_images_change_the_description_of_a_task():
    first, second = make_stream()["a"], make_stream()["a"]
    second.splits.train.images[3, 0, 0, 0] ^= 1
    assert describe_task(first) != describe_task(second)


def test_tensors_of_other_names_shapes_or_dtypes_hash_differently():
    zeros = torch.zeros(4)
    versions = [{"a": zeros}, {"b": zeros}, {"a": zeros.view(2, 2)}, {"a": zeros.double()}, {"a": zeros.bfloat16()}]
    assert len({hash_tensors(version) for version in versions}) == len(versions)

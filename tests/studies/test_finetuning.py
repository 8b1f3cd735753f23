from copy import deepcopy
from functools import partial

import lightning as L
import pytest
import torch
from images import make_model, make_stream, make_trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn

from lightning_odem.callback.guards import FreshStart
from lightning_odem.methods.needs import SecondMoments, Snapshots
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.studies.finetuning import fine_tune, load_own


def tune(model, task, trainer=None, **options):
    options = {"seed": 0, "fresh_start": FreshStart()} | options
    return fine_tune(trainer or make_trainer(), model, task, Division(()), **options)


def by_hand(model, task):
    """The same training without anything of the comparison."""
    module = deepcopy(model)
    L.seed_everything(0, verbose=False)
    make_trainer().fit(module, datamodule=task)
    return module


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_model_is_that_of_a_plain_fit_and_the_base_model_stays():
    model, task = make_model(), make_stream()["b"]
    before = take_snapshot(model)
    tuned = tune(model, task)
    module = by_hand(model, make_stream()["b"])
    everything = take_snapshot(module)
    assert same(tuned.weights | tuned.own, everything)
    assert set(tuned.own) == {"heads.b.weight", "heads.b.bias"}
    assert same(take_snapshot(model), before)


def test_accuracies_are_those_before_and_after_the_training_on_both_splits():
    model, task = make_model(), make_stream()["a"]
    tuned = tune(model, task)
    module = by_hand(model, make_stream()["a"])

    def accuracy(weights, dataset):
        module.load_state_dict(weights, strict=False)
        images = torch.stack([image for image, _ in dataset])
        return (module(images, "a").argmax(1) == torch.as_tensor(dataset.targets)).double().mean().item()

    for split in ("val", "test"):
        dataset = getattr(task.splits, split)
        assert tuned.fine_tuned[split] == pytest.approx(accuracy(tuned.weights, dataset))
        assert tuned.pretrained[split] == pytest.approx(accuracy(take_snapshot(model), dataset))


def test_one_trainer_fine_tunes_one_task_after_the_other_from_the_same_start():
    model, stream, trainer, fresh = make_model(), make_stream(), make_trainer(), FreshStart()
    first, again = (tune(model, stream["a"], trainer, fresh_start=fresh) for _ in range(2))
    assert same(first.weights, again.weights)
    assert not trainer.callbacks or all(type(callback).__name__ != "_Harvest" for callback in trainer.callbacks)


def test_what_the_training_leaves_behind_is_kept():
    model, task = make_model(), make_stream()["a"]
    tuned = tune(model, task, needs=[SecondMoments(), Snapshots(4)])
    moments, snapshots = tuned.collected[SecondMoments], tuned.collected[Snapshots]
    assert set(moments) == {name for name, _ in model.backbone.named_parameters(prefix="backbone")}
    assert all((moment > 0).any() for moment in moments.values())
    assert 2 <= len(snapshots) <= 4
    assert not any(same(snapshot, tuned.weights) for snapshot in snapshots)


def test_given_weights_are_measured_and_not_trained():
    model, task = make_model(), make_stream()["a"]
    trained = tune(model, task)
    given = tune(model, make_stream()["a"], given=trained.weights, needs=[SecondMoments()])
    assert same(given.weights, trained.weights)
    assert same(given.own, trained.own)
    assert (given.fine_tuned, given.pretrained) == (trained.fine_tuned, trained.pretrained)
    assert given.collected == {SecondMoments: None}


def test_what_is_no_class_is_refused_before_training():
    model, task = make_model(), make_stream()["a"]
    steps, trainer = [], make_trainer()
    trainer.callbacks.append(LambdaCallback(on_train_batch_end=lambda *_: steps.append(1)))
    model.prediction_step = partial(_one_column, model)
    with pytest.raises(ValueError, match=r"on task 'a' .*, got float32 \[12, 1\]"):
        tune(model, task, trainer)
    assert not steps


def _one_column(model, batch, task):
    return model(batch[0], task)[:, :1], batch[1]


def test_parameters_of_a_task_that_have_no_place_are_refused():
    with pytest.raises(ValueError, match=r"no place for heads\.a\.scale"):
        load_own(make_model(), {"heads.a.scale": nn.Parameter(torch.ones(1))})

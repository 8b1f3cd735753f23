import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torchvision.transforms import v2

from lightning_odem.tasks import ArrayDataset, Splits
from lightning_odem.tasks.task import EpochSampler


def values(loader):
    return torch.cat([images[:, 0, 0, 0] for images, _ in loader]).tolist()


def brighten(image):
    return image + 50


def test_batches_are_uint8_images_and_int64_labels(make_task):
    images, labels = next(iter(make_task(batch_size=16).train_dataloader()))
    assert (images.shape, images.dtype) == ((16, 1, 4, 4), torch.uint8)
    assert (labels.shape, labels.dtype) == ((16,), torch.int64)


def test_data_are_read_once_and_only_when_needed(make_task):
    reads = []
    data = ArrayDataset(np.zeros((2, 2, 2), dtype=np.uint8), [0, 1])
    task = make_task(splits=lambda: reads.append(1) or Splits(data, data, data))
    assert reads == []
    for stage in ("fit", "test", None):
        task.setup(stage)
        task.test_dataloader()
    assert reads == [1]


def test_prepare_is_called_until_the_data_are_read(make_task):
    calls = []
    task = make_task(prepare=lambda: calls.append(1))
    task.prepare_data()
    task.setup()
    task.prepare_data()
    assert calls == [1]


def test_training_is_shuffled_anew_each_epoch_and_evaluation_is_in_order(make_task):
    task = make_task(batch_size=16)
    loader = task.train_dataloader()
    first, second = values(loader), values(loader)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert values(task.val_dataloader()) == list(range(100, 108))
    assert values(task.test_dataloader()) == list(range(200, 212))


def test_the_shuffle_is_repeatable_and_neither_reads_nor_moves_the_global_generator(make_task):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    task = make_task()
    order = values(task.train_dataloader())
    values(task.val_dataloader()), values(task.test_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert values(task.train_dataloader()) == order == values(make_task().train_dataloader())
    assert values(make_task(seed=1).train_dataloader()) != order


def test_augmentation_reaches_training_batches_only(make_task):
    task = make_task(train_transform=brighten)
    assert sorted(values(task.train_dataloader())) == list(range(50, 90))
    assert values(task.val_dataloader()) == list(range(100, 108))
    assert values(task.test_dataloader()) == list(range(200, 212))


def test_the_calibration_dataset_holds_the_training_samples_without_augmentation(make_task):
    calibration = make_task(train_transform=brighten).calibration_dataset()
    assert [calibration[i][0][0, 0, 0].item() for i in range(len(calibration))] == list(range(40))
    assert calibration.targets.tolist() == [calibration[i][1] for i in range(40)]


def test_augmentation_in_workers_depends_on_the_seed_only(make_task):
    def batches(global_seed, **options):
        torch.manual_seed(global_seed)
        task = make_task(train_transform=v2.GaussianNoise(sigma=0.2), num_workers=1, batch_size=40, **options)
        return next(iter(task.train_dataloader()))[0]

    assert torch.equal(batches(0), batches(1))
    assert not torch.equal(batches(0), batches(0, seed=1))


def test_augmentation_to_float_is_refused(make_task):
    with pytest.raises(TypeError, match="uint8"):
        next(iter(make_task(train_transform=v2.ToDtype(torch.float32)).train_dataloader()))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_must_be_finite_and_not_negative(make_task, weight):
    with pytest.raises(ValueError, match="'ramp'.*weight.*" + str(weight)):
        make_task(weight=weight)


def test_a_weight_of_zero_is_allowed(make_task):
    assert make_task(weight=0).task_weight == 0.0


def test_a_task_needs_classes(make_task):
    with pytest.raises(ValueError, match="num_classes.*0"):
        make_task(num_classes=0)


@pytest.mark.parametrize("split", Splits._fields)
class TestChecksOnReading:
    @pytest.fixture
    def read(self, make_task, split):
        """Read a task in which one split holds the given labels."""

        def read(labels):
            good = ArrayDataset(np.zeros((2, 2, 2), dtype=np.uint8), [0, 1])
            bad = ArrayDataset(np.zeros((len(labels), 2, 2), dtype=np.uint8), labels)
            make_task(splits=lambda: Splits(good, good, good)._replace(**{split: bad}), source="here.npz").setup()

        return read

    def test_an_empty_split_is_named(self, read, split):
        with pytest.raises(ValueError, match=f"'ramp': the {split} split of here.npz is empty"):
            read([])

    @pytest.mark.parametrize("label", [2, -1])
    def test_a_label_out_of_range_is_named_with_its_index(self, read, split, label):
        with pytest.raises(ValueError, match=rf"{split} split of here.npz has label {label} at index 3.*0\.\.1"):
            read([0, 1, 0, label, label])


def test_a_wrong_number_of_targets_is_refused(make_task):
    data = ArrayDataset(np.zeros((2, 2, 2), dtype=np.uint8), [0, 1])
    data.targets = [0]
    with pytest.raises(ValueError, match="2 samples but 1 labels"):
        make_task(splits=lambda: Splits(data, data, data)).setup()


def test_trainer_fits_and_tests_a_task(fit, make_task):
    assert len(fit(make_task(batch_size=8)).seen) == 2


@pytest.mark.parametrize("steps", [4, 8])
def test_a_run_resumed_between_epochs_reads_the_same_order_as_an_uninterrupted_one(
    make_task, recorder, tmp_path, steps
):
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def train(**fit_options):
        model = recorder()
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=steps, save_top_k=-1)
        trainer = Trainer(max_epochs=3, default_root_dir=tmp_path, callbacks=[checkpoint], **options)
        trainer.fit(model, datamodule=make_task(batch_size=10), **fit_options)
        return [images[:, 0, 0, 0].tolist() for images, _ in model.seen]

    whole = train()
    assert train(ckpt_path=tmp_path / f"step={steps}.ckpt") == whole[steps:]
    epochs = [sum(whole[epoch : epoch + 4], []) for epoch in (0, 4, 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_every_epoch_reads_each_sample_once_in_another_order():
    sampler = EpochSampler(range(50), seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_an_epoch_has_the_same_order_whatever_was_read_before():
    straight, resumed = EpochSampler(range(50), seed=3), EpochSampler(range(50), seed=3)
    for epoch in range(3):
        straight.set_epoch(epoch)
        order = list(straight)
    resumed.set_epoch(2)
    assert list(resumed) == order


def test_the_order_depends_on_the_seed_and_not_on_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order = list(EpochSampler(range(50), seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert order == list(EpochSampler(range(50), seed=3))
    assert order != list(EpochSampler(range(50), seed=4))

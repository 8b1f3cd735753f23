import random
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from lightning_odem.calibration.source import DrawnSamples, Reservoir, draw, draw_by_index, targets_of

LABELS = torch.tensor([0] * 30 + [1] * 6 + [2] * 4)


class Images(Dataset):
    """Numbered samples with random augmentation; ``targets`` is what a torchvision dataset calls its labels."""

    def __init__(self, labels=LABELS, targets=True, offset=0):
        self.labels, self.offset, self.loaded = labels, offset, 0
        if targets:
            self.targets = labels.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.loaded += 1
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return torch.stack([torch.tensor(float(index + self.offset)), noise]), int(self.labels[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Images())


def numbered(first, size=20):
    """A dataset whose samples are numbered from ``first``."""
    return TensorDataset(torch.arange(float(first), float(first + size)).view(-1, 1), torch.arange(size) % 2)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.net.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AtTheStart(L.Callback):
    def __init__(self, given, count):
        self.given, self.count = given, count

    def on_train_start(self, trainer, pl_module):
        self.offer = draw(trainer, self.given, self.count, torch.Generator().manual_seed(0))


def draw_in_fit(train=None, given=None, count=4, datamodule=None):
    callback = AtTheStart(given, count)
    trainer = L.Trainer(accelerator="cpu", fast_dev_run=1, enable_progress_bar=False, callbacks=[callback])
    trainer.fit(Module(), train_dataloaders=train, datamodule=datamodule)
    return callback.offer


WHOLE = {"num_training_batches": float("inf")}


def draw_from(dataset, count=12, seed=0, **loader):
    """Draw from training data without a fit: ``draw`` asks a Trainer for nothing but its data."""
    trainer = SimpleNamespace(train_dataloader=DataLoader(dataset, **loader), datamodule=None, **WHOLE)
    return draw(trainer, None, count, torch.Generator().manual_seed(seed))


class Data(L.LightningDataModule):
    def __init__(self, methods):
        super().__init__()
        if "dataset" in methods:
            self.calibration_dataset = lambda: numbered(100)
        if "dataloader" in methods:
            self.calibration_dataloader = lambda: DataLoader(numbered(200), batch_size=3)

    def train_dataloader(self):
        return DataLoader(numbered(0), batch_size=5)


@pytest.mark.parametrize(
    ("given", "methods", "first", "origin"),
    [
        (numbered(300), ["dataset", "dataloader"], 300, "given to the callback"),
        (DataLoader(numbered(400), batch_size=3), ["dataset"], 400, "given to the callback"),
        (None, ["dataset", "dataloader"], 100, "calibration_dataset()"),
        (None, ["dataloader"], 200, "calibration_dataloader()"),
        (None, [], 0, "the training dataset"),
    ],
)
def test_what_the_user_names_comes_before_the_training_data(given, methods, first, origin):
    offer = draw_in_fit(given=given, datamodule=Data(methods))
    numbers = offer.samples[0].flatten()
    assert len(numbers) >= 4
    assert bool(((first <= numbers) & (numbers < first + 20)).all())
    assert origin in offer.origin
    assert not offer.transferred


def test_training_loaders_passed_to_fit_are_drawn_from_by_index():
    dataset = Images()
    offer = draw_in_fit(DataLoader(dataset, batch_size=5, shuffle=True), count=6)
    assert offer.samples[1].bincount().tolist() == [2, 2, 2]
    assert dataset.loaded == 6 + 5  # the fit's own batch


def test_a_choice_that_is_not_balanced_reads_no_target():
    class Unlabelled(Images):
        @property
        def targets(self):
            raise AssertionError("read")

    plain = SimpleNamespace(train_dataloader=DataLoader(Unlabelled(targets=False)), datamodule=None, **WHOLE)
    drawn = draw(plain, None, 6, torch.Generator().manual_seed(0), balanced=False).samples[0][:, 0]
    by_index = draw_by_index(numbered(0, 40), 6, torch.Generator().manual_seed(0), balanced=False)[0].flatten()
    assert (
        drawn.tolist()
        == by_index.tolist()
        == torch.randperm(40, generator=torch.Generator().manual_seed(0))[:6].tolist()
    )


def test_sources_behind_the_first_are_not_asked():
    datamodule = Data(["dataset"])
    datamodule.calibration_dataloader = lambda: pytest.fail("not needed")
    assert draw_in_fit(datamodule=datamodule).origin == "calibration_dataset()"


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


@pytest.mark.parametrize("in_method", [False, True])
def test_the_global_random_state_is_not_touched(in_method):
    split = SimpleNamespace(calibration_dataset=lambda: random_split(Images(), [20, 20])[0])
    trainer = SimpleNamespace(
        train_dataloader=DataLoader(Images(), shuffle=True), datamodule=split if in_method else None
    )
    before = random_states()
    draw(trainer, None, 12, torch.Generator().manual_seed(0))
    assert random_states() == before


def test_random_transforms_give_the_same_samples_for_the_same_seed():
    torch.manual_seed(1)
    first = draw_from(Images()).samples[0]
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    random.seed(2)
    assert torch.equal(draw_from(Images()).samples[0], first)
    assert not torch.equal(draw_from(Images(), seed=1).samples[0], first)


@pytest.mark.parametrize(
    "dataset",
    [
        Images(),
        TensorDataset(torch.zeros(40, 2), LABELS),
        Subset(Images(torch.cat([LABELS, LABELS])), range(40, 80)),
        ConcatDataset([Images(LABELS[:33]), TensorDataset(torch.zeros(7, 2), LABELS[33:])]),
        Subset(ConcatDataset([Images(), Images()]), list(range(40))),
    ],
)
def test_labels_that_a_dataset_tells_balance_the_classes(dataset):
    assert torch.equal(targets_of(dataset), LABELS)
    assert draw_from(dataset).samples[1].bincount().tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "dataset",
    [
        Images(targets=False),
        ConcatDataset([Images(), Images(targets=False)]),
        TensorDataset(torch.zeros(40, 2), LABELS.float()),
        TensorDataset(torch.zeros(40, 2), torch.zeros(40, 2, dtype=torch.long)),
        SimpleNamespace(targets=["cat", "dog"]),
        SimpleNamespace(targets=[[1], [2, 3]]),
    ],
)
def test_datasets_without_class_labels_have_no_targets(dataset):
    assert targets_of(dataset) is None


def test_targets_are_found_without_loading_samples():
    dataset = Images()
    targets_of(Subset(dataset, [1, 2]))
    assert dataset.loaded == 0


def test_a_small_dataset_is_taken_whole():
    numbers = draw_from(numbered(0, size=5), count=50).samples[0].flatten()
    assert sorted(numbers.tolist()) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_samples_are_put_together_by_the_loaders_collate_function():
    def collate(samples):
        return {"image": torch.stack([image for image, _ in samples]), "y": torch.tensor([y for _, y in samples])}

    offer = draw_from(numbered(0), count=6, collate_fn=collate)
    assert {name: len(tensor) for name, tensor in offer.samples.items()} == {"image": 6, "y": 6}


@pytest.mark.parametrize(("count", "taken"), [(1, 3), (3, 3), (4, 6), (100, 7)])
def test_batches_of_a_loader_are_taken_until_there_are_enough(count, taken):
    offer = draw_in_fit(given=DataLoader(numbered(0, size=7), batch_size=3), count=count, datamodule=Data([]))
    assert offer.samples[0].flatten().tolist() == list(range(taken))


def test_samples_share_no_memory_with_their_source():
    source = torch.arange(6.0).view(6, 1)
    loader = [(source[:3], torch.zeros(3)), (source[3:], torch.zeros(3))]
    samples = draw_in_fit(given=iter(loader), count=6, datamodule=Data([])).samples
    source.zero_()
    assert samples[0].flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_iterable_training_data_cannot_be_drawn_from():
    assert draw_in_fit(DataLoader(Stream(), batch_size=4)) is None


@pytest.mark.parametrize("given", [TensorDataset(torch.zeros(0, 1), torch.zeros(0)), iter([])])
def test_an_empty_source_is_an_error(given):
    with pytest.raises(ValueError, match="No calibration sample can be drawn: calibration data given .* is empty"):
        draw_in_fit(given=given, datamodule=Data([]))


def test_several_training_loaders_need_a_calibration_dataset():
    loaders = {"a": DataLoader(numbered(0)), "b": DataLoader(numbered(0))}
    with pytest.raises(ValueError, match=r"training data of type dict; give the datamodule a calibration_dataset\(\)"):
        draw_in_fit(loaders)
    assert isinstance(draw_in_fit(loaders, given=numbered(0)), DrawnSamples)


def fill(reservoir, length, batch_size):
    for batch in torch.arange(length).split(batch_size):
        reservoir.update((batch.view(-1, 1), {"y": batch * 10}))
    return reservoir.samples


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_a_short_stream_is_kept_whole_and_in_order(batch_size):
    samples = fill(Reservoir(20, torch.Generator().manual_seed(0)), 17, batch_size)
    assert samples[0].flatten().tolist() == list(range(17))
    assert torch.equal(samples[1]["y"], samples[0].flatten() * 10)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_long_stream_is_sampled_uniformly(batch_size):
    generator, repeats, capacity, length = torch.Generator().manual_seed(0), 1000, 2, 5
    counts = torch.zeros(length)
    for _ in range(repeats):
        samples = fill(reservoir := Reservoir(capacity, generator), length, batch_size)
        numbers = samples[0].flatten()
        assert len(numbers.unique()) == len(numbers) == capacity
        assert torch.equal(samples[1]["y"], numbers * 10)
        assert reservoir.seen == length
        counts += numbers.bincount(minlength=length)
    p = capacity / length
    assert (counts / repeats - p).abs().max() < 5 * (p * (1 - p) / repeats) ** 0.5


def test_the_reservoir_does_not_depend_on_how_the_stream_is_cut():
    kept = [fill(Reservoir(5, torch.Generator().manual_seed(3)), 40, size)[0].tolist() for size in (1, 4, 40)]
    assert kept[0] == kept[1] == kept[2]


def test_the_reservoir_holds_copies():
    reservoir, batch = Reservoir(4, torch.Generator()), torch.arange(1000.0)
    reservoir.update((batch,))
    batch.zero_()
    reservoir.update((torch.full((1,), 7.0),))
    assert reservoir.samples[0].count_nonzero() == 4
    assert reservoir.samples[0].untyped_storage().nbytes() == 4 * 4


def test_the_reservoir_is_empty_before_the_first_batch():
    assert Reservoir(4, torch.Generator()).samples is None


class OfWorkers(torch.utils.data.Dataset):
    """Samples that tell which process has loaded them."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        worker = torch.utils.data.get_worker_info()
        return torch.tensor([index, -1 if worker is None else worker.id]), torch.rand(())


def test_samples_are_loaded_by_the_workers_of_the_loader():
    first, again = (draw_from(OfWorkers(), 12, num_workers=2, batch_size=4).samples for _ in range(2))
    by_hand = draw_from(OfWorkers(), 12, batch_size=4).samples
    assert set(first[0][:, 1].tolist()) == {0, 1}
    assert set(by_hand[0][:, 1].tolist()) == {-1}
    assert torch.equal(first[0][:, 0], by_hand[0][:, 0])
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))

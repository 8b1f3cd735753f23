"""The samples that a training can see, found without loading one."""

import lightning as L
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from toy import Classifier, Task, make_trainer

from lightning_odem import ContinualMergeCallback
from lightning_odem.calibration.pool import trained_on

pytestmark = pytest.mark.usefixtures("small_stream")


class Forbidden(torch.utils.data.Dataset):
    """A dataset none of whose samples may be loaded."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        raise AssertionError("loaded")


class InPairs(Sampler):
    """Batches of its own making, of some of the samples."""

    def __iter__(self):
        return iter([[0, 2], [4, 6]])

    def __len__(self):
        return 2


def pool_of(batches=float("inf"), **options):
    trainer = L.Trainer(logger=False, accelerator="cpu")
    trainer.fit_loop.max_batches = batches
    found = trained_on(trainer, DataLoader(Forbidden(), **options))
    return list(found.indices) if hasattr(found, "indices") else "all"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "all"),
        ({"shuffle": True}, "all"),
        ({"sampler": range(5)}, [0, 1, 2, 3, 4]),
        ({"sampler": [9, 3, 9]}, [3, 9]),
        ({"sampler": SubsetRandomSampler([8, 2, 5])}, [2, 5, 8]),
        ({"sampler": WeightedRandomSampler([0.0] * 10 + [1.0, 3.0], 20)}, [10, 11]),
        ({"sampler": RandomSampler(range(12), num_samples=3)}, "all"),
        ({"batch_sampler": InPairs()}, [0, 2, 4, 6]),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler([1, 3]), 2, False)}, [1, 3]),
    ],
    ids=["in_order", "shuffled", "range", "list", "subset", "weights", "few_of_all", "batches", "batches_of_subset"],
)
def test_samples_that_the_sampler_leaves_out_are_left_out(options, expected):
    assert pool_of(**options) == expected


def test_limits_leave_out_what_is_behind_the_last_batch_of_batches_in_order():
    assert pool_of(2, batch_size=3) == list(range(6))
    assert pool_of(2, batch_size=3, shuffle=True) == "all"


def test_the_sampler_and_random_numbers_stay_as_they_are():
    sampler = SubsetRandomSampler([1, 3, 5], generator=torch.Generator().manual_seed(1))
    before, numbers = sampler.generator.get_state(), torch.get_rng_state()
    pool_of(sampler=sampler)
    assert torch.equal(before, sampler.generator.get_state())
    assert torch.equal(numbers, torch.get_rng_state())


@pytest.mark.parametrize("settings", [{"limit_train_batches": 2}, {"overfit_batches": 2}])
def test_calibration_samples_are_those_that_a_limited_training_sees(settings):
    inputs, targets = Task(0, size=24).train_set.tensors
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=3)
    merge = ContinualMergeCallback("ode_paper", calibration_size=100)
    make_trainer(merge, **settings).fit(Classifier(), loader)
    kept = merge.state_dict()["buffer"]["tasks"]["task_1"]["samples"][0]
    assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in inputs[:6].tolist()}


def test_samples_of_another_split_are_never_calibration_samples():
    inputs, targets = Task(0, size=24).train_set.tensors
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=3, sampler=SubsetRandomSampler(range(9)))
    merge = ContinualMergeCallback("ode_paper", calibration_size=100)
    make_trainer(merge).fit(Classifier(), loader)
    kept = merge.state_dict()["buffer"]["tasks"]["task_1"]["samples"][0]
    assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in inputs[:9].tolist()}

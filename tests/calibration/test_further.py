import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_odem.calibration.further import FurtherSamples
from lightning_odem.calibration.source import draw_by_index, draw_further

LABELS = torch.arange(30) % 3


class Augmented(Dataset):
    """Ten samples that draw random numbers of all three kinds."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index + torch.rand(()) / 4 + random.random() / 4 + np.random.rand() / 4, index  # noqa: NPY002


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("balanced", [True, False])
def test_they_follow_those_of_the_buffer_in_one_order(balanced):
    dataset = TensorDataset(torch.arange(30), LABELS)
    first = draw_by_index(dataset, 7, generator(), balanced=balanced)[0]
    further = draw_further(dataset, 7, 19, generator(), balanced=balanced)
    rest = torch.cat([batch.samples[0] for batch in further.micro_batches("a", 5)])
    assert len(further) == len(rest) == 12
    assert torch.equal(torch.cat([first, rest]), draw_by_index(dataset, 19, generator(), balanced=balanced)[0])


@pytest.mark.parametrize("limit", [0, 5, 7])
def test_there_are_none_where_the_buffer_has_them_all(limit):
    further = draw_further(TensorDataset(torch.arange(30), LABELS), 7, limit, generator())
    assert len(further) == 0
    assert list(further.micro_batches("a", 5)) == []


def test_no_more_than_the_dataset_has():
    assert len(draw_further(TensorDataset(torch.arange(30), LABELS), 7, 1000, generator())) == 23


def test_shares_are_the_parts_of_the_samples():
    batches = list(draw_further(TensorDataset(torch.arange(30), LABELS), 7, 19, generator()).micro_batches("a", 5))
    assert [(batch.task, batch.transferred, batch.share) for batch in batches] == [
        ("a", False, share) for share in (5 / 12, 5 / 12, 2 / 12)
    ]


def test_what_transforms_draw_is_the_same_each_time_and_leaves_the_global_random_state():
    further = FurtherSamples(Augmented(), torch.arange(10), seed=5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = torch.cat([batch.samples[0] for batch in further.micro_batches("a", 4)])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    torch.rand(3)
    assert torch.equal(first, torch.cat([batch.samples[0] for batch in further.micro_batches("a", 4)]))
    assert len(set((first % 1).tolist())) == 10

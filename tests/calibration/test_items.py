import pytest
import torch

from lightning_odem.calibration.containers import take_apart
from lightning_odem.calibration.items import Items


def collate(samples):
    return torch.stack([x for x, _ in samples]) + torch.rand(()), [label for _, label in samples]


def make_items(collate=None):
    return Items(tuple(take_apart((torch.full((2,), float(row)), row % 2)) for row in range(5)), 2, collate)


def test_batches_have_the_dataloaders_size_and_the_same_random_numbers_every_time():
    state = torch.get_rng_state()
    first, second = (list(make_items(collate).batches()) for _ in range(2))
    assert [index.tolist() for _, index in first] == [[0, 1], [2, 3], [4]]
    assert str(first) == str(second)
    assert torch.equal(torch.get_rng_state(), state)


def test_items_of_an_earlier_process_need_a_collate_function():
    later = Items.from_state(make_items(collate).state())
    with pytest.raises(ValueError, match="collate_fn, which is not known here"):
        next(later.batches())
    assert str(next(later.collated_by(collate).batches())) == str(next(make_items(collate).batches()))


def test_a_collate_function_that_is_known_is_not_replaced():
    assert make_items(collate).collated_by(list).collate is collate


def test_labels_are_those_of_the_items():
    assert make_items().labels().tolist() == [0, 1, 0, 1, 0]
    assert Items((take_apart(("a", 0.5)),), 1).labels() is None

import pytest
import torch

from lightning_odem.calibration.containers import CannotBeKeptError, take_apart
from lightning_odem.calibration.decollation import Decollation

ONES = [take_apart((torch.full((1, 2), float(row)), 0.5)) for row in range(3)]


def kinds(batch, size, **options):
    return [column.kind for column in Decollation(size, **options).cut(take_apart(batch)).columns]


def test_a_list_is_a_container_where_its_items_count_the_samples():
    pair = (torch.zeros(2), torch.ones(2))
    assert kinds({"pair": pair}, 2) == ["tensor", "tensor"]
    assert kinds({"pair": pair, "x": torch.zeros(2)}, 2, lists=True) == ["tuple", "tensor"]


def test_a_batch_may_be_a_list_of_samples_or_not():
    batch = [{"a": 1}, {"a": 2}]
    assert kinds(batch, 2) == ["list"]
    with pytest.raises(CannotBeKeptError, match="nothing in their batch counts"):
        kinds(batch, 2, whole=False)


def test_tensors_that_disagree_on_the_number_of_samples_are_refused():
    with pytest.raises(CannotBeKeptError, match=r"disagree on the number of samples: \[2, 3\]"):
        kinds({"x": torch.zeros(2), "y": torch.zeros(3)}, 2)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_batch_dimension_is_where_a_batch_of_one_has_one(dim):
    ones = [torch.full((1, 2), float(row)).movedim(0, dim) for row in range(3)]
    whole = torch.cat(ones, dim)
    (column,) = Decollation(3).align(whole, whole, ones).columns
    assert (column.kind, column.dim, column.values[:, 0].tolist()) == ("tensor", dim, [0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    "whole",
    [(torch.zeros(3, 2), 0.5), (torch.arange(3.0)[:, None].expand(3, 2), 1.5), (torch.zeros(4, 2), 0.5)],
)
def test_a_batch_that_is_not_made_of_its_samples_is_refused(whole):
    with pytest.raises(CannotBeKeptError, match="depends on what is in the batch"):
        Decollation(3).align(take_apart(whole), take_apart(whole), ONES)


def test_of_random_batches_of_one_shape_the_whole_is_kept():
    whole = torch.zeros(3, 2)
    rows = Decollation(3).align(take_apart((whole, 0.5)), take_apart((whole + 1, 0.5)), ONES)
    assert torch.equal(rows[0], whole)

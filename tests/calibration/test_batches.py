from collections import OrderedDict, namedtuple

import pytest
import torch

from lightning_odem.calibration import batches

Pair = namedtuple("Pair", ["image", "label"])
NESTED = {"image": torch.arange(12).view(4, 3), "more": [torch.arange(4.0), (torch.zeros(4, 2, 2),)]}


@pytest.mark.parametrize("batch", [torch.zeros(4), (torch.zeros(4, 2), torch.zeros(4)), NESTED])
def test_count_is_the_first_dimension_of_every_tensor(batch):
    assert batches.count(batch) == 4


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.zeros(2), "cat"), TypeError, "got str 'cat'"),
        ((torch.zeros(2), torch.tensor(1.0)), TypeError, r"got Tensor tensor\(1.\)"),
        ((torch.zeros(2), None), TypeError, "got NoneType"),
        (Pair(torch.zeros(2), torch.zeros(2)), TypeError, "got a Pair"),
        ([OrderedDict(a=torch.zeros(2))], TypeError, "got a OrderedDict"),
        ((torch.zeros(2), torch.zeros(3)), ValueError, r"\[2, 3\]"),
    ],
)
def test_what_cannot_be_cut_or_stored_is_refused(batch, error, message):
    with pytest.raises(error, match=message):
        batches.count(batch)


def test_a_view_shares_memory_and_a_selection_does_not():
    view, chosen = batches.view(NESTED, slice(1, 3)), batches.select(NESTED, slice(1, 3))
    assert torch.equal(view["image"], chosen["image"])
    assert view["image"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert view["more"][0].data_ptr() == NESTED["more"][0][1:].data_ptr()
    assert chosen["more"][0].untyped_storage().nbytes() == 2 * 4
    assert isinstance(chosen["more"][1], tuple)


def test_a_selection_by_index_keeps_its_order_and_drops_the_graph():
    chosen = batches.select(torch.arange(4.0, requires_grad=True), torch.tensor([2, 0]))
    assert chosen.tolist() == [2.0, 0.0]
    assert not chosen.requires_grad


def test_concatenation_undoes_cutting():
    whole = batches.concatenate([batches.view(NESTED, slice(0, 1)), batches.view(NESTED, slice(1, 4))])
    assert torch.equal(whole["image"], NESTED["image"])
    assert torch.equal(whole["more"][1][0], NESTED["more"][1][0])


@pytest.mark.parametrize(
    ("other", "message"),
    [((torch.zeros(1, 2),), "differ in structure"), ((torch.zeros(1, 3), torch.zeros(1)), "differ in shape")],
)
def test_batches_of_different_make_are_not_joined(other, message):
    with pytest.raises(ValueError, match=message):
        batches.concatenate([(torch.zeros(1, 2), torch.zeros(1)), other])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.zeros(3, 2), torch.tensor([2, 0, 1])), [2, 0, 1]),
        ({"x": torch.zeros(2), "label": torch.tensor([1, 0])}, [1, 0]),
        ({"target": torch.tensor([1, 0]), "y": torch.tensor([7, 7])}, [1, 0]),
        ((torch.zeros(3, 2), torch.zeros(3)), None),
        ((torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long)), None),
        ({"x": torch.zeros(2)}, None),
        (torch.tensor([1, 2]), None),
        ((torch.tensor([1, 2]),), None),
    ],
)
def test_labels_are_integers_in_second_place_or_under_a_known_name(batch, expected):
    found = batches.labels(batch)
    assert (None if found is None else found.tolist()) == expected

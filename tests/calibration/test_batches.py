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


# Batches of a size, as dataloaders lay them out.
LAYOUTS = {
    "contiguous": lambda size: torch.randn(size, 3, 2),
    "channels_last": lambda size: torch.randn(size, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda size: torch.randn(size, 5, 3).transpose(1, 2),
    "frames_first": lambda size: torch.randn(size, 2, 3, 4, 4).transpose(1, 2),
    "stacked_along_time": lambda size: torch.stack([torch.randn(3)] * size, 1).t(),
    "time_first": lambda size: torch.randn(3, size, 2).transpose(0, 1),
    "labels": lambda size: torch.arange(size),
}
CUTS = {
    "index": lambda batch: batches.select(batch, torch.tensor([5, 1, 2])),
    "slice": lambda batch: batches.select(batch, slice(1, 4)),
    "every_other": lambda batch: batches.select(batch, slice(0, None, 2)),
    "copy_of_view": lambda batch: batches.copy(batches.view(batch, slice(0, None, 2))),
    "joined": lambda batch: batches.concatenate([batches.view(batch, slice(1)), batches.view(batch, slice(1, 3))]),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_lie_in_memory_as_in_a_batch_of_their_own(layout, cut):
    (found,) = CUTS[cut]([LAYOUTS[layout](6)])
    assert found.stride() == LAYOUTS[layout](3).stride()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("layout", ["gaps", "expanded", "expanded_over_samples"])
def test_samples_of_a_batch_with_gaps_or_overlaps_are_contiguous(layout, cut):
    make = {"gaps": torch.randn(6, 8)[:, ::2], "expanded": torch.randn(6, 1).expand(6, 4)}
    batch = make.get(layout, torch.randn(1, 4).expand(6, 4))
    assert CUTS[cut](batch).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_cut_from_any_layout_are_the_same_ones(layout):
    batch = LAYOUTS[layout](6)
    rows = {"index": [5, 1, 2], "slice": [1, 2, 3], "every_other": [0, 2, 4], "joined": [0, 1, 2]}
    for name, index in rows.items():
        assert torch.equal(CUTS[name](batch), torch.stack([batch[row] for row in index]))


def test_a_copy_shares_neither_memory_nor_containers_and_keeps_their_kinds():
    pair = Pair(torch.zeros(2), [torch.ones(2, dtype=torch.uint8)])
    batch = {"pair": pair, "more": OrderedDict(name="cat", none=None)}
    copy = batches.copy(batch)
    assert str(copy) == str(batch)
    assert isinstance(copy["pair"], Pair)
    assert isinstance(copy["more"], OrderedDict)
    copy["pair"].image.add_(1)
    copy["pair"].label.append(None)
    copy.pop("more").pop("name")
    assert batch["pair"].image.tolist() == [0, 0]
    assert len(batch["pair"].label) == 1
    assert batch["more"]["name"] == "cat"


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

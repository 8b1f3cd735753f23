import pytest
import torch

from lightning_odem.calibration.column import Column
from lightning_odem.calibration.containers import CannotBeKeptError, Container, take_apart
from lightning_odem.calibration.padding import Padding
from lightning_odem.calibration.rows import Rows, label_of, place


def make_rows(limit=0, padding=None):
    tree = Container("dict", (place(0), place(1)), ("ids", "label"))
    ids = [torch.ones(1, 1 + row % 2) for row in range(4)]
    return Rows(tree, (Column("tensor", ids, padding=padding), Column("tensor", torch.arange(4))), limit)


@pytest.mark.parametrize(
    ("limit", "padding", "expected"),
    [(0, None, [[0, 2], [1, 3]]), (1, None, [[0], [2], [1], [3]]), (0, Padding(0), [[0, 1, 2, 3]])],
)
def test_samples_that_do_not_fit_together_come_in_several_batches(limit, padding, expected):
    parts = list(make_rows(limit, padding).batches())
    assert [index.tolist() for _, index in parts] == expected
    assert [batch["label"].tolist() for batch, _ in parts] == expected


def test_batches_share_no_memory_with_the_samples():
    rows = make_rows()
    for batch, _ in rows.batches():
        batch["label"].fill_(9)
    assert rows["label"].tolist() == [0, 1, 2, 3]


def test_an_entry_is_found_under_its_key():
    assert [value.shape for value in make_rows()["ids"]] == [(1, 1), (1, 2), (1, 1), (1, 2)]
    with pytest.raises(ValueError, match="not in list"):
        make_rows()["text"]


def test_samples_of_another_structure_are_not_joined():
    other = Rows(Container("tuple", (place(0), place(1))), make_rows().columns)
    for join in (make_rows().append, lambda rows: make_rows().put(torch.tensor([0]), rows)):
        with pytest.raises(CannotBeKeptError, match="differ in structure"):
            join(other)


@pytest.mark.parametrize(("values", "expected"), [([3, 1], [3, 1]), (["a", "b"], None), ([0.5, 1.0], None)])
def test_a_list_of_integers_gives_labels(values, expected):
    found = Rows(Container("tuple", (place(0), place(1))), (Column("list", [1, 2]), Column("list", values))).labels()
    assert (found if found is None else found.tolist()) == expected


def test_the_label_of_an_item_is_its_second_entry_or_has_a_name():
    assert label_of(take_apart(("x", 3))) == label_of(take_apart({"x": 1, "target": 3})) == 3
    assert label_of(take_apart({"x": 1, "z": 2})) is None
    assert label_of(torch.zeros(2)) is None

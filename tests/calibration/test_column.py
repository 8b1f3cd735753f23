import pytest
import torch

from lightning_odem.calibration.column import Column
from lightning_odem.calibration.containers import CannotBeKeptError
from lightning_odem.calibration.padding import Padding
from lightning_odem.stream.store import decode, encode

RAGGED = [torch.ones(1, 2), torch.ones(1, 3)]


def test_tensors_of_different_shapes_are_of_one_form_only_if_they_are_padded():
    assert len(set(Column("tensor", RAGGED).forms())) == 2
    column = Column("tensor", RAGGED, padding=Padding(9))
    assert len(set(column.forms())) == 1
    assert column.joined().tolist() == [[1, 1, 9], [1, 1, 1]]


def test_a_value_of_the_batch_is_of_one_form_where_it_is_the_same():
    assert Column("common", [0.5, 0.25, 0.5]).forms() == [0, 1, 0]


def test_tensors_of_another_shape_are_appended_sample_by_sample():
    column = Column("tensor", torch.ones(2, 2)).append(Column("tensor", torch.ones(1, 3)))
    assert [value.shape for value in column.values] == [(1, 2), (1, 2), (1, 3)]
    assert Column("tensor", torch.ones(2, 2)).append(Column("tensor", torch.ones(1, 2))).values.shape == (3, 2)


@pytest.mark.parametrize("other", [Column("list", ["a"]), Column("tensor", torch.ones(1, 2), dim=1)])
def test_columns_of_different_kinds_are_not_joined(other):
    with pytest.raises(CannotBeKeptError, match="differ in structure"):
        Column("tensor", torch.ones(2, 2)).append(other)


@pytest.mark.parametrize("new", [torch.full((1, 2), 5.0), torch.full((1, 3), 5.0)])
def test_samples_are_put_into_the_slots_given(new):
    column = Column("tensor", torch.zeros(3, 2)).put(torch.tensor([1]), Column("tensor", new))
    assert [value.flatten().unique().tolist() for value in column.values] == [[0.0], [5.0], [0.0]]


def test_a_copy_shares_no_memory():
    values = [torch.zeros(1, 2), torch.zeros(1, 3)]
    copy = Column("tensor", values).copy()
    values[0][:] = 1.0
    assert not copy.values[0].any()


@pytest.mark.parametrize(
    "column",
    [
        Column("tensor", torch.arange(6).view(3, 2), dim=1),
        Column("tensor", RAGGED, padding=Padding(-100, at_start=True, trim=True)),
        Column("list", ["a", "b"]),
        Column("common", [torch.ones(2), 0.5, torch.ones(2)]),
    ],
    ids=["tensor", "ragged", "list", "common"],
)
def test_a_column_survives_a_file(column):
    again = Column.from_state(decode(*encode(column.state())))
    assert str(again) == str(column)

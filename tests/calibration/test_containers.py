from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
import pytest
import torch

from lightning_odem.calibration.containers import (
    CannotBeKeptError,
    from_plain,
    put_together,
    same,
    take_apart,
    to_plain,
)
from lightning_odem.stream.store import decode, encode

Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Graph:
    nodes: torch.Tensor
    names: list = field(default_factory=list)

    def __post_init__(self):
        self.size = len(self.nodes)


class Pinned:
    """A batch as PyTorch's documentation has it."""

    def __init__(self, samples):
        self.inputs = torch.stack(samples)

    def pin_memory(self):
        return self


def on_disk(value):
    return decode(*encode(to_plain(take_apart(value))))


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, True, None, "x"], 3: (torch.arange(3), ())},
        Pair(torch.zeros(2), "cat"),
        UserDict(ids=torch.arange(2)),
        OrderedDict(b=1, a=2),
        torch.Size([2, 3]),
    ],
)
def test_containers_come_back_as_what_they_were(value):
    back = put_together(from_plain(on_disk(value)))
    assert type(back) is type(value)
    assert str(back) == str(value)


def test_a_default_dict_comes_back_without_its_default():
    back = put_together(take_apart(defaultdict(list, a=[1])))
    assert isinstance(back, defaultdict)
    assert back == {"a": [1]}


def test_a_dataclass_keeps_what_is_no_field_and_is_not_made_anew():
    graph = Graph(torch.ones(3), ["a"])
    graph.size = 7
    back = put_together(from_plain(on_disk(graph)))
    assert isinstance(back, Graph)
    assert (back.nodes.tolist(), back.names, back.size) == ([1, 1, 1], ["a"], 7)


def test_a_batch_with_methods_for_the_loop_is_what_it_holds():
    back = put_together(take_apart(Pinned([torch.zeros(2), torch.ones(2)])))
    assert isinstance(back, Pinned)
    assert back.inputs.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("value", [np.arange(3, dtype=np.float32), np.float64(0.5), np.int64(3)])
def test_arrays_and_their_numbers_come_back(value):
    back = put_together(from_plain(on_disk(value)))
    assert type(back) is type(value)
    assert back.dtype == value.dtype
    assert back.tolist() == value.tolist()


def test_what_is_put_together_has_memory_of_its_own():
    apart = take_apart([torch.zeros(2), np.zeros(2)])
    first = put_together(apart)
    first[0].add_(1)
    first[1] += 1
    assert [part.tolist() for part in put_together(apart)] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("value", [BytesIO(), {"a": object()}, {(1, 2): 3}, np.array(["a"]), torch.nn.Linear(1, 1)])
def test_what_no_file_can_hold_is_refused(value):
    with pytest.raises(CannotBeKeptError, match="they h"):
        take_apart(value)


def test_a_value_that_contains_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(CannotBeKeptError, match="contain themselves"):
        take_apart(value)


def test_a_type_that_is_not_loaded_is_not_imported():
    stored = {**on_disk(UserDict(a=1)), "type": "antigravity:Batch"}
    with pytest.raises(ValueError, match="a Batch of antigravity, which this process has not loaded"):
        put_together(from_plain(stored))


def test_a_name_of_something_else_than_a_container_is_not_called():
    for name in ("os:system", "subprocess:Popen", "builtins:eval"):
        stored = {**on_disk(UserDict(a=1)), "type": name}
        with pytest.raises(ValueError, match="has not loaded"):
            put_together(from_plain(stored))


def test_equality_looks_at_every_tensor():
    one, other = ({"a": [torch.zeros(2), value]} for value in (1.0, 2.0))
    assert same(take_apart(one), take_apart(one))
    assert not same(take_apart(one), take_apart(other))
    assert not same(take_apart(torch.zeros(2)), take_apart(torch.zeros(3)))
    assert same(float("nan"), float("nan"))

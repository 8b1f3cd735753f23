import collections
import contextlib
import json
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from identical import identical
from safetensors.torch import load, save

from lightning_odem.stream.store import decode, encode

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
]


def through_files(value):
    """As the store does it: the structure through JSON, the tensors through safetensors."""
    structure, tensors = encode(value)
    return decode(json.loads(json.dumps(structure, allow_nan=False)), load(save(tensors)))


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    raw = draw(st.binary(min_size=16, max_size=16)) * (math.prod(shape) or 1)
    if dtype == torch.bool:
        raw = bytes(byte % 2 for byte in raw)
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype)[: math.prod(shape)].reshape(shape)
    return tensor.permute(draw(st.permutations(range(len(shape)))))


keys = st.text(max_size=5) | st.integers() | st.sampled_from(["$tensor", "$dict", "a.b", "__metadata__"])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors()
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values)
def test_a_value_comes_back_bit_for_bit(value):
    assert identical(through_files(value), value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["w", "complex64", "7ff8"]),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.text() | st.sampled_from(["$tensor", "$tuple", "$float", "$dict", "order", "dtype"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(json_values)
def test_any_json_is_decoded_or_a_value_error(structure):
    with contextlib.suppress(ValueError):
        decode(structure, {"w": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    "structure",
    [
        {"$tensor": "missing"},
        {"$tensor": "w", "order": [0, 0]},
        {"$tensor": "w", "order": [0, 7]},
        {"$tensor": "w", "order": "01"},
        {"$tensor": "w", "dtype": "load"},
        {"$tensor": "w", "dtype": ["complex64"]},
        {"$tensor": "w", "more": 1},
        {"$float": "7ff8"},
        {"$float": "no digits"},
        {"$tuple": {"a": 1}},
        {"$dict": [["key"]]},
        {"$dict": [[["list"], 1]]},
        {"$unknown": 1},
        {"$float": "7ff8000000000000", "a": 1},
        b"bytes",
    ],
)
def test_a_structure_that_stands_for_nothing_is_refused(structure):
    with pytest.raises(ValueError, match="structure|tensor|hexadecimal"):
        decode([structure], {"w": torch.zeros(2, 3)})


def test_a_structure_deeper_than_the_recursion_limit_is_refused():
    structure = None
    for _ in range(100_000):
        structure = [structure]
    with pytest.raises(ValueError, match="nested too deeply"):
        decode(structure, {})


def test_the_deepest_value_that_is_encoded_is_decoded():
    value = 1
    for _ in range(64):
        value = (value,)
    assert through_files(value) == value
    with pytest.raises(TypeError, match="more than 64 levels deep"):
        encode((value,))


def test_a_value_that_contains_itself_is_refused():
    value = {}
    value["self"] = value
    with pytest.raises(TypeError, match=r"self\.self.* contains itself"):
        encode(value, "method")


def test_names_are_the_paths_and_never_the_same():
    one = torch.ones(1)
    tree = {"a.b": one, "a": {"b": one * 2}, "list": [one * 3], 0: one * 4, "0": one * 5, "__metadata__": one * 6}
    assert list(encode(tree, "method")[1]) == ["a.b", "a.b~2", "list[0]", "0", "0~2", "__metadata__~2"]
    assert list(encode(one, "method")[1]) == ["value"]
    assert identical(through_files(tree), tree)


def test_a_model_keeps_its_parameters_names():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state = dict(model.state_dict())
    assert list(encode(state, "base")[1]) == list(state)


def test_parameters_come_back_as_tensors():
    back = through_files([torch.nn.Parameter(torch.ones(2))])[0]
    assert type(back) is torch.Tensor
    assert not back.requires_grad


def test_channels_last_stays_channels_last_and_is_not_copied():
    images = torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensor = encode(images)[1]["value"]
    assert tensor.data_ptr() == images.data_ptr()
    back = through_files(images)
    assert back.stride() == images.stride()
    assert torch.equal(back, images)


def test_tensors_that_overlap_come_back_apart():
    line = torch.arange(6.0)
    value = [line, line[2:], line, line[::2], line.expand(2, 6), torch.tensor(1.0).expand(3)]
    assert identical(back := through_files(value), value)
    back[0].zero_()
    assert identical(back[1:], value[1:])


def test_halves_of_one_memory_are_not_copied():
    line = torch.arange(6.0)
    assert [tensor.data_ptr() for tensor in encode([line[:3], line[3:]])[1].values()] == [
        line.data_ptr(),
        line[3:].data_ptr(),
    ]


def test_conjugates_and_negatives_are_stored_as_they_read():
    number = torch.tensor([1 + 2j])
    value = [number.conj(), number.conj().imag]
    assert torch.equal(through_files(value)[0], torch.tensor([1 - 2j]))
    assert torch.equal(through_files(value)[1], torch.tensor([-2.0]))


def test_every_nan_keeps_its_bits():
    odd = struct.unpack(">d", bytes.fromhex("fff8000000000abc"))[0]
    assert struct.pack(">d", through_files([odd])[0]).hex() == "fff8000000000abc"


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.zeros(2), r"buffer\.tasks\.mnist\.samples\[0\] is a numpy.ndarray"),
        (np.float64(1.0), r"samples\[0\] is a numpy.float64"),
        (Point(1, 2), r"samples\[0\] is a .*Point"),
        (collections.OrderedDict(), "is a collections.OrderedDict"),
        (b"bytes", "is a builtins.bytes"),
        ({1.5: 2}, r"samples\[0\] has the key 1\.5"),
        ({True: 2}, "has the key True"),
        (torch.ones(2).to_sparse(), "sparse_coo tensor"),
        (torch.ones(2, device="meta"), "on meta"),
        (torch.empty(2, dtype=torch.bits8), "torch.bits8"),
        (torch.nested.nested_tensor([torch.ones(2)]), "tensor of torch.float32"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(leaf, message):
    with pytest.raises(TypeError, match=message):
        encode({"tasks": {"mnist": {"samples": [leaf]}}}, "buffer")

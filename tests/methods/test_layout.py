import math

import pytest
import torch
from vectors import MATRICES, SHAPES, make_context

from lightning_odem.methods.layout import matrices, others, parts, tensors, weight_matrices

SIZE = 72 + 6 + 18 + 45 + 48 + 4


def test_tensors_are_views_in_the_order_and_shape_of_the_parameters():
    vector = torch.arange(float(SIZE))
    pieces = tensors(vector, make_context(None))
    assert {name: tuple(piece.shape) for name, piece in pieces.items()} == SHAPES
    assert pieces["tall.weight"][0, 0] == 72 + 6 + 18
    pieces["wide.bias"].fill_(-1)
    assert vector[-4:].tolist() == [-1] * 4


def test_matrices_have_two_dimensions_above_one():
    assert weight_matrices(make_context(None)) == MATRICES
    shapes = {"one output": (1, 9), "one input": (9, 1), "depthwise": (8, 1, 3, 3), "scalar": (), "bias": (9,)}
    assert weight_matrices(make_context(None, shapes)) == ["depthwise"]


def test_depthwise_convolutions_are_vectors_where_groups_are_known():
    shapes = {"depthwise": (8, 1, 3, 3), "twofold": (8, 1, 3, 3), "grouped": (8, 2, 1, 1), "one input": (8, 1, 1, 1)}
    groups = {"depthwise": 8, "twofold": 4, "grouped": 4, "one input": 2}
    assert weight_matrices(make_context(None, shapes, groups=groups)) == ["twofold", "grouped"]


def test_convolutions_can_be_left_out():
    assert weight_matrices(make_context(None), convolutions=False) == MATRICES[1:]


@pytest.mark.parametrize(
    ("layers", "names"), [(["*"], MATRICES), (["tall", "conv"], ["conv.weight", "tall.weight"]), (["w*"], MATRICES[2:])]
)
def test_patterns_select_layers(layers, names):
    assert weight_matrices(make_context(None), layers) == names


def test_a_pattern_that_selects_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"layers=\['position'\] matches no weight matrix; .*: conv.weight, tall"):
        weight_matrices(make_context(None), ["wide", "position"])


def test_the_walk_gives_views_of_all_vectors_and_tells_how_far_it_is():
    steps, vectors = [], (torch.zeros(SIZE), torch.zeros(SIZE))
    context = make_context(None, on_step=lambda *step: steps.append(step))
    shapes = []
    for first, second in matrices(context, MATRICES[:2], *vectors):
        first += 1
        second -= 1
        shapes.append(tuple(second.shape))
    assert shapes == [(6, 12), (9, 5)]
    for vector, value in zip(vectors, (1, -1), strict=True):
        assert tensors(vector, context)["conv.weight"].unique().tolist() == [value]
        assert vector.count_nonzero() == 72 + 45
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_the_others_are_all_the_rest():
    vector = torch.zeros(SIZE)
    for (piece,) in others(make_context(None), MATRICES, vector):
        piece += 1
    assert vector.sum() == 6 + 18 + 4


def walk(shapes, **settings):
    """Keys, rows and entries of the parts of a vector that counts up."""
    outputs_first = settings.pop("outputs_first", False)
    context = make_context(None, shapes, **settings)
    vector = torch.arange(float(sum(math.prod(shape) for shape in shapes.values())))
    found = list(parts(context, list(shapes), vector, outputs_first=outputs_first))
    return [(part.key, part.rows, matrix) for part, (matrix,) in found]


def assert_parts(found, expected):
    assert [key for key, _, _ in found] == [key for key, _ in expected]
    for (_, _, matrix), (_, value) in zip(found, expected, strict=True):
        assert torch.equal(matrix, value)


def test_the_groups_of_a_convolution_are_parts():
    weight = torch.arange(6.0 * 2 * 3).view(6, 6)
    found = walk({"conv.weight": (6, 2, 3)}, groups={"conv.weight": 3})
    assert_parts(found, [(f"conv.weight:{index}", weight[2 * index : 2 * index + 2]) for index in range(3)])
    assert [rows for _, rows, _ in found] == [2, 2, 2]


def test_groups_of_a_convolution_of_packed_layers_come_first():
    assert len(walk({"qkv.weight": (6, 2, 3)}, groups={"qkv.weight": 2})) == 2


@pytest.mark.parametrize("outputs_first", [False, True])
def test_packed_layers_stored_by_inputs_lie_side_by_side(outputs_first):
    shapes = {"attn.c_attn.weight": (2, 6), "crossattention.c_attn.weight": (3, 6), "mlp.c_fc.weight": (2, 6)}
    found = walk(shapes, transposed=frozenset(shapes), outputs_first=outputs_first)
    first, second, third = (
        tensor.view(shape)
        for tensor, shape in zip(torch.arange(42.0).split([12, 18, 12]), shapes.values(), strict=True)
    )
    expected = [(f"attn.c_attn.weight:{index}", first[:, 2 * index : 2 * index + 2]) for index in range(3)]
    expected += [(f"crossattention.c_attn.weight:{index}", second[:, 3 * index : 3 * index + 3]) for index in range(2)]
    expected += [("mlp.c_fc.weight", third)]
    assert_parts(found, [(key, matrix.T if outputs_first else matrix) for key, matrix in expected])
    assert [rows for _, rows, _ in found] == [2] * 3 + [3] * 2 + [2]


def test_packed_layers_stored_by_outputs_lie_below_each_other():
    weight = torch.arange(12.0).view(6, 2)
    expected = [(f"c_attn.weight:{index}", weight[2 * index : 2 * index + 2]) for index in range(3)]
    assert_parts(walk({"c_attn.weight": (6, 2)}, outputs_first=True), expected)
    assert len(walk({"c_attn.weight": (5, 2)})) == 1  # keys and values that heads share


def test_the_groups_of_a_transposed_convolution_lie_along_its_inputs():
    weight = torch.arange(4.0 * 6).view(4, 6)
    settings = {"groups": {"conv.weight": 2}, "transposed": frozenset({"conv.weight"}), "outputs_first": True}
    found = walk({"conv.weight": (4, 3, 2)}, **settings)
    assert_parts(found, [("conv.weight:0", weight[:2].T), ("conv.weight:1", weight[2:].T)])


def test_parts_share_the_memory_of_the_vector():
    context = make_context(None, {"c_attn.weight": (2, 6)}, transposed=frozenset({"c_attn.weight"}))
    vector = torch.zeros(12)
    for part, (matrix,) in parts(context, context.names, vector, outputs_first=True):
        matrix.fill_(part.number)
    assert vector.view(2, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 2

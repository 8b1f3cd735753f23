import pytest
import torch
from vectors import MATRICES, SHAPES, make_context

from lightning_odem.methods.layout import matrices, others, tensors, weight_matrices

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

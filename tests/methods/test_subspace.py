import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_odem.methods.subspace import Subspace, orthonormal

FP64 = torch.float64


def random(*shape, seed=0, dtype=FP64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, FP64])
@pytest.mark.parametrize("shape", [(3, 40), (5, 5), (6, 2), (1, 1)])
def test_a_basis_is_orthonormal_and_spans_the_directions(shape, dtype):
    directions = random(*shape, dtype=dtype)
    basis = orthonormal(directions)
    tolerance = 10 * torch.finfo(dtype).eps
    assert basis.shape == (min(shape), shape[1])
    assert basis.dtype == dtype
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=dtype), atol=tolerance, rtol=0)
    torch.testing.assert_close(directions @ basis.T @ basis, directions, atol=10 * tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, FP64])
def test_directions_made_of_others_add_nothing(dtype):
    first, second = random(2, 30, dtype=dtype)
    basis = orthonormal(torch.stack([first, 1e-3 * second, first + second, -first, torch.zeros_like(first)]))
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=dtype))
    torch.testing.assert_close(second @ basis.T @ basis, second)


def test_the_rank_does_not_depend_on_the_length_of_the_vectors():
    assert orthonormal(torch.stack([torch.ones(2_000_000), torch.arange(2_000_000.0)])).shape == (2, 2_000_000)


def test_nearly_parallel_directions_still_give_an_orthonormal_basis():
    first, second = random(2, 30)
    basis = orthonormal(torch.stack([first, first + 1e-9 * second]))
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=FP64), atol=1e-12, rtol=0)


def test_no_direction_gives_no_basis():
    assert orthonormal(torch.zeros(4, 9)).shape == (0, 9)


def test_the_origin_is_the_point_of_coefficients_zero():
    origin = random(7)
    subspace = Subspace(origin, [random(2, 4), random(0, 2), random(1, 1)])
    assert subspace.dimension == 3
    assert torch.equal(subspace.point(torch.zeros(3, dtype=FP64)), origin)


def test_coefficients_move_their_own_tensor():
    origin, bases = random(7), [random(2, 4, seed=1), random(0, 2), random(1, 1, seed=2)]
    point = Subspace(origin, bases).point(torch.tensor([2.0, -1.0, 3.0], dtype=FP64))
    torch.testing.assert_close(point[:4], origin[:4] + 2 * bases[0][0] - bases[0][1])
    assert torch.equal(point[4:6], origin[4:6])
    torch.testing.assert_close(point[6:], origin[6:] + 3 * bases[2][0])


def test_pulling_back_is_the_gradient_by_the_coefficients():
    """Against autograd through the coefficients, the module called at the point they give."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    names, parameters = zip(*net.named_parameters(), strict=True)
    origin = torch.cat([parameter.detach().flatten() for parameter in parameters])
    subspace = Subspace(origin, [random(3, parameter.numel(), seed=i) for i, parameter in enumerate(parameters)])
    coefficients = random(subspace.dimension, seed=9).requires_grad_()
    inputs = random(5, 3, seed=10)

    pieces = subspace.point(coefficients).split([parameter.numel() for parameter in parameters])
    weights = {name: piece.view_as(old) for name, piece, old in zip(names, pieces, parameters, strict=True)}
    loss = functional_call(net, weights, (inputs,)).square().sum()
    (expected,) = torch.autograd.grad(loss, coefficients, retain_graph=True)
    by_weights = torch.autograd.grad(loss, list(weights.values()))
    gradient = torch.cat([piece.flatten() for piece in by_weights])
    torch.testing.assert_close(subspace.pull_back(gradient), expected)

"""The nearest velocity under which given losses do not rise faster than allowed."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

# Vectors are processed in blocks: no fp64 copy is ever as long as a model.
_BLOCK = 1 << 18
# Relative to the distances from the constraints. Gradients that are parallel within it are treated as one.
_TOLERANCE = 1e-7


def project_(velocity: Tensor, gradients: Sequence[Tensor], bounds: Sequence[float]) -> list[float]:
    r"""Move a velocity w, in place, to the nearest one that obeys linear constraints.

    .. math:: v = \arg\min_v \tfrac12 \|v - w\|^2 \quad \text{subject to} \quad \langle g_j, v\rangle \le b_j,
        \qquad v = w - \sum_j \mu_j g_j

    If no velocity obeys all constraints, w stays as it is. A gradient of zero constrains nothing.

    Args:
        velocity: w, shape [d]; overwritten by v.
        gradients: The g_j, m vectors of shape [d]; all 2^m sets of active constraints may be tried.
        bounds: The b_j, allowed changes of loss j per unit time.

    Returns:
        The multipliers mu_j >= 0; 0 where a constraint is not active.

    Example:
        >>> velocity = torch.tensor([1.0, 1.0])
        >>> project_(velocity, [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])], bounds=[0.0, 3.0])
        [0.5, 0.0]
        >>> velocity
        tensor([0., 1.])
    """
    products = _inner_products([*gradients, velocity])
    rates, gram = products[-1, :-1], products[:-1, :-1]
    multipliers = solve_multipliers(gram, rates - torch.tensor(bounds, dtype=gram.dtype)).tolist()
    for multiplier, gradient in zip(multipliers, gradients, strict=True):
        velocity.sub_(gradient, alpha=multiplier)
    return multipliers


def solve_multipliers(gram: Tensor, excess: Tensor) -> Tensor:
    """Multipliers of the projection: the first set of active constraints that satisfies the KKT conditions.

    The problem is convex, so any such set gives the solution; the smallest sets are tried first. Gradients are scaled
    to length 1, so neither the equations nor the tolerance depend on the size of the multipliers. The released code of
    ODE-M adds 1e-6 to the diagonal and allows a violation of 1e-6. An active constraint is violated by 1e-6 mu there.
    So mu > 1, which small gradients have, drops all constraints.

    Args:
        gram: Inner products of the gradients, shape [m, m], fp64.
        excess: <g_j, w> - b_j, the violation of each constraint before the projection, shape [m], fp64.

    Returns:
        mu, shape [m]; zeros if the constraints contradict each other.
    """
    lengths = gram.diagonal().sqrt()
    scale = torch.where(lengths > 0.0, 1.0 / lengths, 0.0)
    cosines, distances = gram * scale * scale[:, None], excess * scale
    tolerance = _TOLERANCE * distances.norm()
    count = len(excess)
    for active in (list(chosen) for size in range(count + 1) for chosen in combinations(range(count), size)):
        block = cosines[active][:, active]
        solution = torch.zeros_like(distances)
        solution[active] = torch.linalg.pinv(block, rtol=0.1 * _TOLERANCE, hermitian=True) @ distances[active]
        if (solution >= 0.0).all() and (distances - cosines @ solution <= tolerance).all():
            return solution * scale
    return torch.zeros_like(excess)


def _inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """All inner products of n vectors of shape [d], accumulated in fp64; shape [n, n], on the CPU."""
    # Apple's GPU has no fp64.
    device = torch.device("cpu") if vectors[0].device.type == "mps" else vectors[0].device
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=device)
    for pieces in zip(*(vector.split(_BLOCK) for vector in vectors), strict=True):
        block = torch.stack(pieces).to(device).double()
        products += block @ block.T
    return products.cpu()

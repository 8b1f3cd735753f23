"""Means of updates of adapters, kept as factors as long as these are smaller than the matrix.

A mean of updates of rank r has at most r directions more with each task. It is kept as one tensor [m + n, k]: the
factors [m, k] and [n, k] of the matrix [m, n] one above the other. The first dimension tells it from the matrix.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_odem.parameters.low_rank import few_rows, truncated

TOLERANCE = 1e-6
"""What may be lost relative to a matrix's norm: a few roundings of fp32."""


def compact(update: Tensor, rank: int) -> Tensor:
    """Factors [m + n, k] of a new update [m, ...] of about this rank, or a copy of it if they would not be smaller.

    Example:
        >>> compact(torch.ones(40, 3, 20), rank=1).shape, compact(torch.eye(40), rank=1).shape
        (torch.Size([100, 1]), torch.Size([40, 40]))
    """
    if update.dim() > 1 and update.dtype == torch.float32:
        matrix = update.flatten(1).cpu().double()
        if (basis := few_rows(matrix, rank)) is not None:
            return _stacked(matrix @ basis, basis.T, update)
    return update.to("cpu", copy=True)


def whole(kept: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor of a shape, from its factors or from itself."""
    if not is_factored(kept, shape):
        return kept
    columns, rows = kept.split([shape[0], math.prod(shape[1:])])
    return (columns @ rows.T).view(*shape)


def moved(kept: Tensor, found: Tensor, t: float, shape: Sequence[int]) -> Tensor:
    """The mean (1 - t) kept + t found of two tensors of a shape, as factors if both are given so."""
    if not (is_factored(kept, shape) and is_factored(found, shape)):
        return whole(kept, shape).lerp(whole(found, shape), t)
    halves = [each.double().split([shape[0], math.prod(shape[1:])]) for each in (kept, found)]
    columns = torch.cat([share * half[0] for share, half in zip((1.0 - t, t), halves, strict=True)], dim=1)
    rows = torch.cat([half[1] for half in halves], dim=1).T
    return _stacked(columns, rows, kept.new_empty(shape, device="meta"))


def is_factored(kept: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor is the factors of one of a shape."""
    return kept.dim() == 2 and len(shape) > 1 and len(kept) == shape[0] + math.prod(shape[1:])


def _stacked(columns: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """The factors of a product with no more directions than it has; the product in the shape of ``like`` if smaller."""
    columns, rows, values = truncated(columns, rows, len(rows))
    tails = values.square().flip(0).cumsum(0).flip(0)
    rank = max(int((tails > TOLERANCE**2 * tails[0]).sum()), 1)
    stacked = torch.cat([columns[:, :rank], rows[:rank].T]).to(like.dtype)
    return stacked if stacked.numel() < like.numel() else whole(stacked, like.shape)

"""Updates of weights that are kept as two factors of low rank."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FactorPair:
    """Two tensors A and B of which a model computes with ``scale`` times B A alone: the update of a weight.

    A mean of several A times a mean of several B is not the mean of the products. So merges see the product.

    Args:
        first: Name of A, shape [r, in] or, of a convolution, [r, in, height, width]. The update goes by this name.
        second: Name of B, shape [out, r] or [out, r, 1, 1].
        scale: The factor on the product.
        inputs_first: Whether the factors are stored as A [in, r] and B [r, out]; the update is then A B.

    Example:
        >>> pair = FactorPair("lora_A", "lora_B", scale=2.0)
        >>> pair.product(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]]))
        tensor([[ 2.,  4.],
                [ 6., 12.]])
    """

    first: str
    second: str
    scale: float
    inputs_first: bool = False

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """The update, in fp32 or the factors' higher precision."""
        dtype = torch.promote_types(first.dtype, torch.float32)
        first, second = first.detach().to(dtype), second.detach().to(dtype)
        if self.inputs_first:
            return first @ second * self.scale
        return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:]) * self.scale

    def factors(self, update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A and B whose update is the best approximation of a given one by this rank, in its dtype.

        The rows of A are orthonormal as far as the update has that many directions, so that either factor has a
        gradient where the other one is to be trained on.
        """
        wide = _exact((update.T if self.inputs_first else update).flatten(1)) / self.scale
        if (basis := few_rows(wide, rank)) is not None:
            second, first = truncated(wide @ basis, basis.T, rank)[:2]
        # By the eigenvectors of the smaller Gram matrix, in fp64: what squaring loses is below the rounding of fp32.
        elif wide.shape[0] > wide.shape[1]:
            first = torch.linalg.eigh(wide.T @ wide)[1].flip(1)[:, :rank].T
            second = wide @ first.T
        else:
            second = torch.linalg.eigh(wide @ wide.T)[1].flip(1)[:, :rank]
            first = second.T @ wide
            lengths = torch.linalg.vector_norm(first, dim=1)
            lengths = torch.where(lengths > 1e-9 * lengths.max(), lengths, 1.0)
            first, second = first / lengths[:, None], second * lengths
        return self._stored(second, first, rank, update, update.shape[1:])

    def combination(self, terms: Sequence[tuple[float, Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """A and B as in :meth:`factors` for a sum of updates, each given by its coefficient, A and B.

        The sum is the product of the terms' concatenated factors. It is cut without being formed, in memory for
        the factors.

        Returns:
            A, B, and the singular values of the sum.
        """
        like = terms[0][1]
        sides = [(c, a.T, b.T) if self.inputs_first else (c, a, b) for c, a, b in terms]
        columns = torch.cat([coefficient * _exact(second.flatten(1)) for coefficient, _, second in sides], dim=1)
        rows = torch.cat([_exact(first.flatten(1)) for _, first, _ in sides])
        second, first, values = truncated(columns, rows, rank)
        return *self._stored(second, first, rank, like, like.shape[1:]), values * abs(self.scale)

    def _stored(
        self, second: Tensor, first: Tensor, rank: int, like: Tensor, inputs: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """A and B in the shapes that the module stores."""
        missing = rank - len(first)
        if missing > 0:  # the rank is above that of any matrix of the shape
            first = torch.cat([first, first.new_zeros(missing, first.shape[1])])
            second = torch.cat([second, second.new_zeros(len(second), missing)], dim=1)
        first, second = first.to(like), second.to(like)
        if self.inputs_first:
            return first.T.contiguous(), second.T.contiguous()
        return first.reshape(rank, *inputs), second.reshape(*second.shape, *(1,) * (len(inputs) - 1))

    def project_(self, gradient: Tensor, first: Tensor, second: Tensor) -> None:
        """Leave of a gradient with respect to the update only what changes of the factors can follow, in place.

        Where the factors have fewer directions than their rank, nothing is taken away: the update may get new ones.
        """
        if self.inputs_first:
            gradient, first, second = gradient.T, first.T, second.T
        bases = [torch.linalg.qr(factor) for factor in (second.flatten(1), first.flatten(1).T)]
        sizes = [triangle.diagonal().abs() for _, triangle in bases]
        if all(size.min() > 1e-5 * size.max() for size in sizes):
            (left, _), (right, _) = bases
            beyond = gradient.flatten(1) - left @ (left.T @ gradient.flatten(1))
            gradient -= (beyond - (beyond @ right) @ right.T).view(gradient.shape)

    def rank(self, first: Tensor) -> int:
        """The rank, from the shape of A."""
        return first.shape[1] if self.inputs_first else first.shape[0]

    def plain(self) -> list[Any]:
        """The pair as a list that JSON can hold; ``FactorPair(*plain)`` is the pair."""
        return list(astuple(self))


FactorPairs = Mapping[str, FactorPair]
"""Pairs by the name of their update, that of A."""


def with_updates(tensors: Mapping[str, Tensor], pairs: FactorPairs) -> dict[str, Tensor]:
    """Tensors by name with the update of each pair instead of its factors; a pair without B is left as it is."""
    seen = dict(tensors)
    for pair in pairs.values():
        if pair.first in seen and pair.second in seen:
            seen[pair.first] = pair.product(seen[pair.first], seen.pop(pair.second))
    return seen


def with_factors(
    tensors: Mapping[str, Tensor], pairs: FactorPairs, like: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Tensors by name with the factors of each update instead of it, cut to the rank of the factors in ``like``.

    Returns:
        The tensors, and by how much all updates differ from what they were, relative to their norm.
    """
    kept, cut, whole = dict(tensors), 0.0, 0.0
    changed = [pair for name, pair in pairs.items() if name in tensors]
    for pair in changed:
        update = tensors[pair.first]
        kept[pair.first], kept[pair.second] = pair.factors(update, pair.rank(like[pair.first]))
        left = pair.product(kept[pair.first], kept[pair.second])
        cut += float(torch.linalg.vector_norm(update - left)) ** 2
        whole += float(torch.linalg.vector_norm(update)) ** 2
    return kept, (cut / whole) ** 0.5 if whole else 0.0


def truncated(columns: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of a product [m, k] [k, n] by a rank, without the product.

    Returns:
        Factors [m, rank] and [rank, n], the rows of the second orthonormal; at most k of each. And all singular values.

    Example:
        >>> columns, rows = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.eye(2)
        >>> left, right, values = truncated(columns, rows, 1)
        >>> left @ right, values
        (tensor([[2., 0.],
                [0., 0.],
                [0., 0.]]), tensor([2., 1.]))
    """
    (left, upper), (right, lower) = torch.linalg.qr(columns), torch.linalg.qr(rows.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ (u[:, :rank] * s[:rank]), vh[:rank] @ right.T, s


def _exact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def few_rows(matrix: Tensor, rank: int) -> Tensor | None:
    """An orthonormal basis [n, k] of the rows of a matrix [m, n], if a few times the rank are enough for all of it.

    A sum of updates has few directions. They are found as combinations of rows with random coefficients, which
    misses none of them.
    """
    whole, size = matrix.square().sum(), 4 * rank
    while 2 * size <= min(matrix.shape):
        random = torch.randn(len(matrix), size, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(matrix.T @ random.to(matrix))[0]
        if whole - (matrix @ basis).square().sum() <= 1e-12 * whole:
            return basis
        size *= 2
    return None

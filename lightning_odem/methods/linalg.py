"""The linear algebra of the methods that look at weight matrices."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Norms are summed in blocks that fit the cache: no fp64 copy is ever as long as a model.
_BLOCK = 1 << 20
# Above this size a decomposition takes long enough to be worth a detour.
_LARGE = 256


def exact(tensor: Tensor) -> Tensor:
    """The tensor in fp64, moved to the CPU if its device has no fp64 (Apple's GPU)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def total(number: float, sum_: Callable[[Tensor], None] | None) -> float:
    """The sum of a number over shards, see :class:`~lightning_odem.methods.MergeContext`; itself without shards.

    Example:
        >>> total(2.0, None), total(2.0, lambda numbers: numbers.mul_(3))
        (2.0, 6.0)
    """
    if sum_ is None:
        return number
    numbers = torch.tensor([number], dtype=torch.float64)
    sum_(numbers)
    return numbers.item()


def exact_sum(numbers: Iterable[Tensor]) -> float:
    """The sum of scalars, rounded once; they are read from their device together."""
    return math.fsum(torch.stack(list(numbers)).tolist())


def norm(vector: Tensor, sum_: Callable[[Tensor], None] | None = None) -> float:
    """Euclidean norm of a vector, accumulated in fp64; with ``sum_``, that of the whole vector from its shards."""
    square = exact_sum(exact(piece).square().sum() for piece in vector.split(_BLOCK))
    return math.sqrt(total(square, sum_))


def cosine(a: Tensor, b: Tensor, sum_: Callable[[Tensor], None] | None = None) -> float:
    """Cosine between two vectors, accumulated in fp64; 0 if one of them vanishes.

    Example:
        >>> cosine(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])), cosine(torch.zeros(2), torch.ones(2))
        (0.6, 0.0)
    """
    pieces = zip(a.split(_BLOCK), b.split(_BLOCK), strict=True)
    product = total(exact_sum(exact(x).dot(exact(y)) for x, y in pieces), sum_)
    lengths = norm(a, sum_) * norm(b, sum_)
    return product / lengths if lengths else 0.0


def singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition U diag(S) V^T without the directions that are zero up to rounding.

    The basis of a null space is arbitrary, so no rule should depend on it. A singular value counts as zero below S_1 *
    max(m, n) * eps, with the eps of the matrix's own dtype. Computed in fp64: directions of close singular values come
    out of an fp32 decomposition with only a few digits. Large matrices of fp32 or less go through the eigenvectors of
    their smaller Gram matrix, two to five times faster on a CPU. Squaring costs digits. But with the threshold of a
    large fp32 matrix, a singular value that counts keeps at least seven digits.

    Args:
        matrix: Shape [m, n], not zero-sized.

    Returns:
        U [m, r], S [r] in falling order and V [n, r], in fp64; r is the numerical rank, 0 for a zero matrix.

    Example:
        >>> u, s, v = singular(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
        >>> s, (u @ v.T).abs()
        (tensor([3.], dtype=torch.float64), tensor([[1., 0.],
                [0., 0.]], dtype=torch.float64))
    """
    wide = exact(matrix)
    if matrix.dtype == torch.float64 or max(matrix.shape) < _LARGE:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        v = vh.T
    else:
        transposed = wide.shape[0] > wide.shape[1]
        wide = wide.T if transposed else wide
        squares, u = torch.linalg.eigh(wide @ wide.T)
        s, u = squares.clamp(min=0.0).sqrt().flip(0), u.flip(1)
        v = (wide.T @ u).div_(s)
        u, v = (v, u) if transposed else (u, v)
    rank = int((s > s[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    return u[:, :rank], s[:rank], v[:, :rank]

"""Vectors cut into blocks, and the projection of the transport onto the gradient in each of them."""

import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_odem.flow.deferred import Deferred, wide

if TYPE_CHECKING:
    from lightning_odem.flow.field import Velocity

# Vectors are processed in pieces that fit the cache of a CPU. Their temporaries are so small that an allocator keeps
# their memory: getting it anew from the system in each step would take longer than the sums.
_PIECE = 1 << 16
# On other devices each operation on a piece is a launch of some microseconds, so few pieces are fast.
_PIECE_OF_DEVICE = 1 << 22

# Sums numbers (fp64, on the CPU) in place over the processes that each hold a part of the vectors.
SumOverShards = Callable[[Tensor], None]


def alone(numbers: Tensor) -> None:
    """The sum over shards if the vectors are whole: it adds nothing."""


class Projection(NamedTuple):
    """The projection P u of the transport onto the gradient, block by block, in numbers.

    ``rise`` sums the positive <g_b, u_b>. ``uphill_square`` sums the ||P_b u||^2 of the same blocks. ``uphill`` holds
    their components along g_b.
    """

    alignment: float
    rise: float
    transport_square: float
    along_square: float
    uphill_square: float
    uphill: Tensor


class Blocks(Protocol):
    """A way to cut vectors into blocks."""

    def project(self, theta: Tensor, theta1: Tensor, grad: Tensor, alpha: float) -> Deferred[Projection]:
        """Project the transport onto the gradient; no number is read from the device yet."""
        ...

    def move_(self, out: Tensor, velocity: "Velocity", scale: float) -> None:
        """Add ``scale * velocity`` to ``out``."""
        ...


class WholeVector:
    """One block.

    Args:
        sum_: Sums over shards.
    """

    def __init__(self, sum_: SumOverShards = alone) -> None:
        self._sum_ = sum_

    def project(self, theta: Tensor, theta1: Tensor, grad: Tensor, alpha: float) -> Deferred[Projection]:
        """Project the transport onto the gradient; no number is read from the device yet."""
        sums, size = wide(theta.new_zeros(3)), piece_on(theta.device)
        # All pieces use the same temporaries.
        narrow = theta.new_empty(min(size, len(theta)))
        temporaries = narrow, *(wide(narrow[:0]).new_empty(len(narrow)) for _ in range(2))
        for point, target, piece in _pieces(theta, theta1, grad, size=size):
            narrow, distance, gradient = (each[: len(point)] for each in temporaries)
            distance.copy_(torch.sub(target, point, out=narrow))
            gradient.copy_(piece)
            sums += torch.stack([distance.dot(gradient), gradient.dot(gradient), distance.dot(distance)])

        def finish(sums: Tensor) -> Projection:
            self._sum_(sums)
            product, grad_square, distance_square = sums.split(1)
            return _project(product, grad_square, distance_square, alpha)

        return Deferred(sums, finish)

    def move_(self, out: Tensor, velocity: "Velocity", scale: float) -> None:
        """Add ``scale * velocity`` to ``out``."""
        damping = float(velocity.damping)
        for target, theta, theta1, grad in _pieces(out, velocity.theta, velocity.theta1, velocity.grad):
            target.add_(theta1 - theta, alpha=scale * velocity.alpha)
            if damping:
                target.add_(grad, alpha=-scale * damping)


class Segments:
    """Consecutive blocks of given lengths. A block that lies in several pieces is summed part by part.

    Args:
        lengths: Lengths of the blocks, shape [B].
        sum_: Sums over shards.
        split: Which blocks continue in the other shards, shape [B], bool. Each shard has the same number of them, in
            the same order. None means that no block does.
    """

    def __init__(self, lengths: Tensor, sum_: SumOverShards = alone, split: Tensor | None = None) -> None:
        ends = lengths.cpu().cumsum(0)
        self._size = int(lengths.sum())
        self._sum_ = sum_
        self._split = torch.zeros(len(lengths), dtype=torch.bool) if split is None else split.cpu()
        self._piece = piece_on(lengths.device)
        piece_ends = torch.arange(1, math.ceil(max(self._size, 1) / self._piece)) * self._piece
        part_ends = torch.cat([ends, piece_ends]).unique()
        part_ends = part_ends[part_ends > 0]
        part_lengths = part_ends.diff(prepend=part_ends.new_zeros(1))
        block_of_part = torch.searchsorted(ends, part_ends)
        parts_per_piece = torch.bincount((part_ends - 1) // self._piece, minlength=1).tolist()
        self._parts_per_block = torch.bincount(block_of_part, minlength=len(lengths))
        self._lengths, self._blocks = (
            parts.to(lengths.device).split(parts_per_piece) for parts in (part_lengths, block_of_part)
        )

    def project(self, theta: Tensor, theta1: Tensor, grad: Tensor, alpha: float) -> Deferred[Projection]:
        """Project the transport onto the gradient; no number is read from the device yet."""
        if len(theta) != self._size:
            raise ValueError(f"The blocks hold {self._size} entries in all, the vectors {len(theta)}.")
        # Results have memory of their own: small tensors that stay would fragment the memory of temporaries.
        counts = [len(lengths) for lengths in self._lengths]
        numbers = wide(theta.new_zeros(2 * sum(counts) + 1))
        parts, distance_square = numbers[:-1].view(2, -1), numbers[-1]
        vectors = _pieces(theta, theta1, grad, size=self._piece)
        pieces = zip(vectors, self._lengths, parts.split(counts, dim=1), strict=True)
        for (point, target, gradient), lengths, sums in pieces:
            distance, gradient = wide(target - point), wide(gradient)
            distance_square += distance.dot(distance)
            sums[0] = _sums(distance.mul_(gradient), lengths)
            sums[1] = _sums(gradient * gradient, lengths)

        def finish(numbers: Tensor) -> Projection:
            product, grad_square = (_sums(row, self._parts_per_block) for row in numbers[:-1].view(2, -1))
            project = _project if self._sum_ is alone else self._project_shard
            return project(product, grad_square, numbers[-1], alpha)

        return Deferred(numbers, finish)

    def move_(self, out: Tensor, velocity: "Velocity", scale: float) -> None:
        """Add ``scale * velocity`` to ``out``."""
        # In fp64: a block may have a gradient so small that one over it is infinite in fp32.
        damping = torch.as_tensor(velocity.damping, dtype=torch.float64, device=out.device)
        vectors = _pieces(out, velocity.theta, velocity.theta1, velocity.grad, size=self._piece)
        for (target, theta, theta1, grad), lengths, blocks in zip(vectors, self._lengths, self._blocks, strict=True):
            target.add_(theta1 - theta, alpha=scale * velocity.alpha)
            of_part = damping[blocks.to(out.device)]
            of_entry = of_part.repeat_interleave(lengths.to(out.device), output_size=len(target))
            target.sub_(of_entry.mul_(grad), alpha=scale)

    def _project_shard(
        self, products: Tensor, grad_squares: Tensor, distance_square: Tensor, alpha: float
    ) -> Projection:
        """Like :func:`_project`: whole blocks in this shard contribute only their totals, split blocks every sum."""
        split, own = self._split, ~self._split
        here = _project(products[own], grad_squares[own], distance_square, alpha)
        totals = distance_square.new_tensor(here[:-1])
        numbers = torch.cat([totals, products[split], grad_squares[split]])
        self._sum_(numbers)
        totals, product, grad_square = numbers.split([len(totals), *2 * [int(split.sum())]])
        across = _project(product, grad_square, totals.new_zeros(()), alpha)
        uphill = torch.empty_like(products)
        uphill[own], uphill[split] = here.uphill, across.uphill
        return Projection(*(totals + totals.new_tensor(across[:-1])).tolist(), uphill)  # type: ignore[call-arg]


class Coordinates:
    """One block per entry. The projection of u_i has the length of u_i, and 0 where the gradient is zero.

    Signs are used instead of masks: they are several times as fast, and unlike g_i u_i their products cannot underflow.

    Args:
        sum_: Sums over shards.
    """

    def __init__(self, sum_: SumOverShards = alone) -> None:
        self._sum_ = sum_

    def project(self, theta: Tensor, theta1: Tensor, grad: Tensor, alpha: float) -> Deferred[Projection]:
        """Project the transport onto the gradient; no number is read from the device yet."""

        def products(theta: Tensor, theta1: Tensor, grad: Tensor) -> Tensor:
            distance = theta1 - theta
            along = distance * grad.sign()
            distance, along, uphill, slope = map(wide, (distance, along, along.relu(), grad.abs()))
            pairs = [(along, slope), (uphill, slope), (distance, distance), (along, along), (uphill, uphill)]
            return torch.stack([first.dot(second) for first, second in pairs])

        def finish(sums: Tensor) -> Projection:
            self._sum_(sums)
            alignment, rise = (alpha * sums[:2]).tolist()
            transport_square, along_square, uphill_square = (alpha**2 * sums[2:]).tolist()
            return Projection(alignment, rise, transport_square, along_square, uphill_square, uphill=sums.new_ones(1))

        return Deferred(reduce(torch.add, (products(*piece) for piece in _pieces(theta, theta1, grad))), finish)

    def move_(self, out: Tensor, velocity: "Velocity", scale: float) -> None:
        """Add ``scale * velocity`` to ``out``."""
        damping = float(velocity.damping)
        for target, theta, theta1, grad in _pieces(out, velocity.theta, velocity.theta1, velocity.grad):
            distance = theta1 - theta
            if damping:
                direction = grad.sign()
                distance.addcmul_((distance * direction).relu_(), direction, value=-damping)
            target.add_(distance, alpha=scale * velocity.alpha)


def _project(products: Tensor, grad_squares: Tensor, distance_square: Tensor, alpha: float) -> Projection:
    """Project from <g_b, theta1 - theta> and ||g_b||^2 of all blocks [B] and ||theta1 - theta||^2; fp64 on the CPU."""
    alignments = alpha * products
    # Without a gradient there is no direction to damp: the projection onto it is zero.
    along = torch.where(grad_squares > 0.0, alignments / grad_squares, 0.0)
    uphill = along.clamp(min=0.0)
    return Projection(
        alignments.sum().item(),
        alignments.clamp(min=0.0).sum().item(),
        alpha**2 * distance_square.item(),
        (along * alignments).sum().item(),
        (uphill * alignments).sum().item(),
        uphill,
    )


def _pieces(*vectors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    size = size or piece_on(vectors[0].device)
    return zip(*(vector.split(size) for vector in vectors), strict=True)


def piece_on(device: torch.device) -> int:
    """Entries of the pieces in which long vectors are gone through."""
    return _PIECE if device.type == "cpu" else _PIECE_OF_DEVICE


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums over consecutive segments, in a fixed order unlike sums by index, so every run gives the same bits."""
    return torch.segment_reduce(values, "sum", lengths=lengths.to(values.device), unsafe=True)

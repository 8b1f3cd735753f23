"""The part of each process in one pass over calibration samples: what it takes, and what it adds to the result."""

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning_odem.calibration.batches import count
from lightning_odem.calibration.samples import MicroBatch

# The 64 bits of a loss are four numbers below 2^16. fp32 holds them exactly, also after zeros are added.
_WORDS = 4


class Piece(NamedTuple):
    """Samples of one micro-batch that one process takes.

    Args:
        batch: The samples; their share is the micro-batch's times ``part``.
        source: Index of the micro-batch.
        part: The fraction of its samples that these are.
    """

    batch: MicroBatch
    source: int
    part: float


def partition(batches: Sequence[MicroBatch], rank: int, size: int) -> list[Piece]:
    r"""The samples that process ``rank`` of ``size`` takes, in the order of the micro-batches.

    The process takes those of all N samples in a row from :math:`\lfloor N r / R \rfloor` up to
    :math:`\lfloor N (r + 1) / R \rfloor`. So no process takes two samples more than another. If there are fewer
    samples than processes, some take none. Summed over all processes, share times mean loss is that of the
    micro-batches. Nothing is copied.

    Example:
        >>> import torch
        >>> batches = [MicroBatch(torch.arange(4), "a", 0.5, False), MicroBatch(torch.arange(2), "b", 0.5, False)]
        >>> for rank in range(2):
        ...     pieces = partition(batches, rank, 2)
        ...     [(piece.batch.samples.tolist(), piece.batch.share, piece.source) for piece in pieces]
        [([0, 1, 2], 0.375, 0)]
        [([3], 0.125, 0), ([0, 1], 0.5, 1)]
    """
    counts = [count(batch.samples) for batch in batches]
    start, stop = (sum(counts) * number // size for number in (rank, rank + 1))
    pieces = []
    for source, (batch, samples) in enumerate(zip(batches, counts, strict=True)):
        first, last = max(start, 0), min(stop, samples)
        if first < last:
            part = (last - first) / samples
            pieces.append(Piece(replace(batch.view(slice(first, last)), share=batch.share * part), source, part))
        start, stop = start - samples, stop - samples
    return pieces


def partition_each(batches: Sequence[MicroBatch], rank: int, size: int) -> list[Piece]:
    r"""As :func:`partition`, but every process takes a piece of every micro-batch.

    A process that would have none takes one sample with share 0. Processes that share the parameters have to run
    equally many passes, on the same tasks in the same order.

    Example:
        >>> import torch
        >>> sizes = {"digits": 3, "letters": 1}
        >>> batches = [MicroBatch(torch.arange(size), task, size / 4, False) for task, size in sizes.items()]
        >>> for rank in range(2):
        ...     [(piece.batch.samples.tolist(), piece.batch.share) for piece in partition_each(batches, rank, 2)]
        [([0], 0.25), ([0], 0.0)]
        [([1, 2], 0.5), ([0], 0.25)]
    """
    pieces = []
    for source, batch in enumerate(batches):
        samples = count(batch.samples)
        first, last = (samples * number // size for number in (rank, rank + 1))
        part = (last - first) / samples
        piece = batch.view(slice(first, last) if part else slice(0, 1))
        pieces.append(Piece(replace(piece, share=batch.share * part), source, part))
    return pieces


def tail_length(size: int) -> int:
    """Entries of a tail among ``size`` processes."""
    return 2 + size * _WORDS


def tail(loss: float, rank: int, size: int, *, failed: bool, reached: bool) -> list[float]:
    """Numbers that process ``rank`` of ``size`` appends to its part of a gradient, to be summed with it.

    Args:
        loss: Its part of the loss.
        rank: Its number.
        size: Number of processes.
        failed: Whether its evaluation failed.
        reached: Whether its part has a gradient.
    """
    words = [0.0] * (size * _WORDS)
    words[rank * _WORDS : (rank + 1) * _WORDS] = map(float, struct.unpack("<4H", struct.pack("<d", loss)))
    return [float(failed), float(reached), *words]


def read_tail(sums: Sequence[float]) -> tuple[float, bool, bool]:
    """The whole loss, exactly rounded, whether any process failed, and whether any has a gradient.

    Example:
        >>> parts = [tail(0.1, 0, 2, failed=False, reached=True), tail(0.2, 1, 2, failed=False, reached=False)]
        >>> read_tail([sum(entries) for entries in zip(*parts)])
        (0.30000000000000004, False, True)
    """
    failed, reached, *words = map(int, sums)
    losses = struct.unpack(f"<{len(words) // _WORDS}d", struct.pack(f"<{len(words)}H", *words))
    return math.fsum(losses), failed > 0, reached > 0

"""The part of each process in one pass over calibration samples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning_odem.calibration.batches import count
from lightning_odem.calibration.samples import MicroBatch


class Piece(NamedTuple):
    """Samples of one micro-batch that one process takes.

    Args:
        batch: The samples; their share is the micro-batch's times ``part``.
        source: Index of the micro-batch.
        part: How many of its samples these are, as a fraction.
    """

    batch: MicroBatch
    source: int
    part: float


def shard(batches: Sequence[MicroBatch], rank: int, size: int) -> list[Piece]:
    r"""The samples that process ``rank`` of ``size`` takes, in the order of the micro-batches.

    Of N samples in a row these are the ones from :math:`\lfloor N r / R \rfloor` up to
    :math:`\lfloor N (r + 1) / R \rfloor`, so that no two processes differ by more than one sample; where there are
    fewer samples than processes, some take none. Summed over all processes, share times mean loss gives that of the
    micro-batches. Nothing is copied.

    Example:
        >>> import torch
        >>> batches = [MicroBatch(torch.arange(4), "a", 0.5, False), MicroBatch(torch.arange(2), "b", 0.5, False)]
        >>> for rank in range(2):
        ...     [(piece.batch.samples.tolist(), piece.batch.share, piece.source) for piece in shard(batches, rank, 2)]
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


def shard_each(batches: Sequence[MicroBatch], rank: int, size: int) -> list[Piece]:
    r"""As :func:`shard`, but a piece of every micro-batch for every process, one sample with share 0 if it has none.

    Where processes share the parameters all of them have to run as many passes, on the same tasks in the same order.

    Example:
        >>> import torch
        >>> sizes = {"digits": 3, "letters": 1}
        >>> batches = [MicroBatch(torch.arange(size), task, size / 4, False) for task, size in sizes.items()]
        >>> for rank in range(2):
        ...     [(piece.batch.samples.tolist(), piece.batch.share) for piece in shard_each(batches, rank, 2)]
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

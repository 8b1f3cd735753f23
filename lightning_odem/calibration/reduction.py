"""Numbers that travel at the end of a process's part of a gradient, through the same sum over the processes."""

import math
import struct
from collections.abc import Sequence

# The 64 bits of a loss as four numbers below 2^16, which fp32 holds exactly, in sums with zeros as well.
_WORDS = 4


def tail_length(size: int) -> int:
    """Entries of a tail among ``size`` processes."""
    return 2 + size * _WORDS


def tail(loss: float, rank: int, size: int, *, failed: bool, reached: bool) -> list[float]:
    """What process ``rank`` of ``size`` adds to the sum.

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

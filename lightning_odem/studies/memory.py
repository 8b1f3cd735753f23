"""Peak memory of a block."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Peak:
    """Bytes in use at the peak beyond those at the start of the block; NaN if they cannot be measured."""

    bytes: float = math.nan


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the highest memory use of a block above its start.

    On CUDA, the tensors of torch's allocator are measured. On the CPU, the resident memory of the process is measured,
    whose highest value Linux records. Memory that was freed before the block but kept by the allocator is reused
    without being counted, so the peak of small blocks is underestimated.

    Example:
        >>> with peak_memory(torch.device("cpu")) as peak:
        ...     size = torch.ones(4_000_000).sum()
        >>> math.isnan(peak.bytes) or peak.bytes >= 0
        True
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    start = _restart()
    yield peak
    if start is not None:
        peak.bytes = max(_status("VmHWM") - start, 0)


def _restart() -> int | None:
    try:
        _CLEAR.write_text("5")
        return _status("VmRSS")
    except (OSError, KeyError):
        return None


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines[field].split()[0])

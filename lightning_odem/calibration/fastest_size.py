"""The size of micro-batches at which passes are fastest, as far as memory allows, found by trying."""

import math
import time
from collections.abc import Callable

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_odem.calibration.batches import count
from lightning_odem.calibration.objective import CalibrationObjective
from lightning_odem.calibration.samples import MicroBatch

_START = 16
_REPEATS = 3
# A larger size has to be this much faster per sample: it takes more memory, and times are noisy.
_GAIN = 1.05
# Vectors of the model's size that a merge holds at most besides those that a gradient takes.
_HELD = 6


def fastest_size(seconds: Callable[[int], float], largest: int, start: int = _START) -> int:
    """The size after which doubling does not make samples 5 % faster, or takes more memory than there is.

    Args:
        seconds: Time of a pass over a micro-batch of a size; raises ``torch.OutOfMemoryError`` if it does not fit.
        largest: The largest size that makes sense.
        start: The size to begin with. If it does not fit, it is halved until it does.

    Raises:
        torch.OutOfMemoryError: If a single sample does not fit.

    Example:
        >>> fastest_size(lambda size: float(max(size, 64)), largest=1000)  # up to 64, passes take the same time
        64
    """
    best, speed, size = 0, 0.0, min(start, largest)
    while True:
        try:
            found = size / seconds(size)
        except torch.OutOfMemoryError:
            if best or size == 1:
                if not best:
                    raise
                return best
            largest = size = size // 2
        else:
            if found < _GAIN * speed:
                return best
            best, speed = size, found
            if size == largest:
                return best
            size = min(2 * size, largest)


def fastest_micro_batches(objective: CalibrationObjective) -> int:
    """The fastest size for gradients of a calibration loss; the choice of the first process, in all processes.

    The largest one is the most samples that may share a micro-batch: those of one task, or of several.

    Args:
        objective: The loss. The module stays at the point that it is at.
    """
    buffer, vector, processes = objective.buffer, objective.vector, objective.processes
    theta = vector.read()

    def micro_batch(size: int) -> MicroBatch:
        batches = objective.joined(theta, list(buffer.micro_batches(size)), size)
        return max(batches, key=lambda batch: count(batch.samples))

    def seconds(size: int) -> float:
        held = torch.empty(_HELD, len(vector), dtype=vector.dtype, device=vector.device)
        # Each process gets one of these, or a part of each.
        batches = processes.size * [micro_batch(size)]
        times = []
        for _ in range(1 + _REPEATS):  # the first one is slow
            started = time.perf_counter()
            objective.loss_and_grad(theta, batches)
            times.append(time.perf_counter() - started)
        del held
        fastest = torch.tensor([min(times[1:])], dtype=torch.float32, device=vector.device)
        return max(processes.broadcast_(fastest).item(), math.ulp(1.0))

    size = fastest_size(seconds, count(micro_batch(len(buffer)).samples))
    rank_zero_info(
        f"Calibration in micro-batches of {size} samples, the fastest size that was tried (batch_size='auto'). The "
        "stream keeps it."
    )
    return size

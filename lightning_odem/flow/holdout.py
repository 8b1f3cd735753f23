"""The point of a path with the lowest held-out loss, which the path itself does not follow."""

import math
from collections.abc import Callable

from torch import Tensor

from lightning_odem.arguments import check_range
from lightning_odem.flow.solver import NonFiniteLossError

_ROUNDING = 1e-6


class LowestPoint:
    """Look at the points of a path as it is followed and keep the one of lowest loss, in one more vector [d].

    It looks at the first point at or after ``start``, at points that are ``every`` or more later than the last one it
    looked at, and at the end.

    Args:
        loss: Loss at a point, on samples that the path's gradients do not see.
        start: Time of the first candidate.
        end: Time at which the path ends.
        every: Distance in time between looks.

    Raises:
        NonFiniteLossError: When looking, if the loss is not finite.

    Attributes:
        t: Times looked at.
        loss: Losses there.
        best_t: Time of the lowest loss. A later point counts as lower only if its loss is lower by more than a
            millionth. Smaller differences are rounding, and the first point counts.

    Example:
        >>> import torch
        >>> lowest = LowestPoint(lambda theta: float((theta - 0.3).square()), start=0.1, end=0.5, every=0.1)
        >>> for t in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        ...     lowest(t, torch.tensor(t))
        >>> lowest.best_t, len(lowest.t)
        (0.3, 5)
    """

    def __init__(self, loss: Callable[[Tensor], float], start: float, end: float, every: float) -> None:
        self._measure, self._due, self._end = loss, check_range("start", start, 0), check_range("end", end, 0)
        self._every = check_range("every", every, 0)
        self.t: list[float] = []
        self.loss: list[float] = []
        self.best_t = start
        self._lowest = math.inf
        self._best: Tensor | None = None

    def __call__(self, t: float, theta: Tensor) -> None:
        """Look at a point."""
        # Multiples of a step length are off by a rounding error.
        if t < min(self._due, self._end) * (1.0 - 1e-9):
            return
        value = float(self._measure(theta))
        if not math.isfinite(value):
            raise NonFiniteLossError(f"the loss on held-out samples is {value}", len(self.t), t)
        if not self.loss or value < self._lowest - _ROUNDING * abs(self._lowest):
            self._best = theta.clone() if self._best is None else self._best.copy_(theta)
            self.best_t, self._lowest = t, value
        self.t.append(t)
        self.loss.append(value)
        self._due = t + self._every

    def write_(self, theta: Tensor) -> None:
        """Set ``theta`` to the best point and drop the copy of it."""
        assert self._best is not None, "a path has an end"
        theta.copy_(self._best)
        self._best = None

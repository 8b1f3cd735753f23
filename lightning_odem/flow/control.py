"""How a path is cut into steps: all of one length, or as long as the loss allows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_odem.arguments import LEAST_STEP, check_range, shown
from lightning_odem.flow.trajectory import Trajectory

Move = Callable[[float], None]


@dataclass(frozen=True)
class StepControl:
    r"""Step lengths chosen by comparing the loss with the envelope of Theorem 3.4.

    The exact flow keeps :math:`L(\theta(t)) \le E(t) = L_0 + t \max(\Delta L, 0)`; a step that is too long does not.
    With the excess :math:`e = L(\theta(t + h)) - E(t + h)` and :math:`\epsilon` = ``tolerance``
    :math:`\max(|L_0|, |L_1|)`, where :math:`L_1` is the incoming model's loss, a step of length h is

    - taken back and tried again with ``shrink`` h if :math:`e > \epsilon`,
    - kept otherwise; if :math:`e \le \epsilon / 2`, the next step is ``grow`` times as long.

    A step no longer than ``smallest`` times the first is kept in any case. The path has then left the envelope by more
    than the step's own error, and it has to arrive.

    Args:
        tolerance: Allowed excess relative to the losses of the two models, > 0. 0.01 is a choice, not tuned.
        shrink: Factor in (0, 0.99] after a rejected step.
        grow: Factor >= 1 after a step well inside.
        smallest: Shortest step that can be rejected, relative to the first one, in [1e-6, 1].

    Raises:
        ValueError: For a number outside its range.

    Example:
        >>> control = StepControl()
        >>> [control.factor(excess, scale=1.0) for excess in (-0.3, 0.008, 0.02)]
        [1.5, 1.0, 0.5]
    """

    tolerance: float = 0.01
    shrink: float = 0.5
    grow: float = 1.5
    smallest: float = 1 / 64

    def __post_init__(self) -> None:
        try:
            check_range("tolerance", self.tolerance, 0, open_low=True)
            check_range("shrink", self.shrink, 0, 0.99, open_low=True)  # nearer to 1, tries have no end
            check_range("grow", self.grow, 1)
            check_range("smallest", self.smallest, LEAST_STEP, 1)
        except ValueError as error:
            raise ValueError(f"{error} All in all got {shown(self)}.") from error

    def factor(self, excess: float, scale: float) -> float:
        """Return the factor for the step length; below 1 the step is rejected.

        Args:
            excess: Loss above the envelope at the end of the step.
            scale: The larger of the two models' losses.
        """
        allowed = self.tolerance * scale
        if excess > allowed:
            return self.shrink
        return self.grow if excess <= allowed / 2 else 1.0


class Steps(Protocol):
    """The steps of one path.

    Attributes:
        t: Time of the point that the path has reached.
        taken: Steps taken so far.
        loss: The loss at that point if it is known without its gradient.
    """

    t: float
    taken: int
    loss: float | None

    @property
    def total(self) -> int:
        """Steps in all, as far as is known."""
        ...

    def advance(self, theta: Tensor, move: Move) -> float:
        """Move ``theta`` to the end of the next step with ``move(t_next)``; return the time there."""
        ...


class FixedSteps:
    """Steps of one length, the last one shortened so that the path ends exactly at ``t_end``.

    Example:
        >>> steps = FixedSteps(0.5, 0.2)
        >>> while steps.taken < steps.total:
        ...     print(steps.advance(None, lambda t_next: None))
        0.2
        0.4
        0.5
    """

    def __init__(self, t_end: float, step_size: float, loss: float | None = None) -> None:
        self._t_end, self._step_size = t_end, step_size
        self.total = math.ceil(t_end / step_size * (1.0 - 1e-12))
        self.t, self.taken, self.loss = 0.0, 0, loss

    def advance(self, theta: Tensor, move: Move) -> float:
        """Take the next step."""
        self.taken += 1
        last = self.taken == self.total
        t_next = self._t_end if last else self.t + self._step_size
        move(t_next)
        # A product instead of a sum, so that rounding errors do not add up.
        self.t, self.loss = (t_next if last else self.taken * self._step_size), None
        return t_next


class ControlledSteps:
    """Steps whose length follows :class:`StepControl`; rejected ones are noted in the trajectory.

    The loss is measured once per try, without a gradient. A rejected step costs no gradient, because the velocity at
    its start is still known. One more vector [d] is held: the point to go back to.

    Args:
        t_end: Time at which the path ends, hit exactly.
        step_size: Length of the first step.
        control: The rule.
        measure: Loss at a point, given its time.
        trajectory: The trajectory of the path; its first loss and ``loss1`` define the envelope.
        loss: Loss at the start, if it is known without its gradient.
    """

    def __init__(
        self,
        t_end: float,
        step_size: float,
        control: StepControl,
        measure: Callable[[float, Tensor], float],
        trajectory: Trajectory,
        loss: float | None = None,
    ) -> None:
        self._t_end, self._control, self._measure, self._trajectory = t_end, control, measure, trajectory
        self._length, self._floor = step_size, control.smallest * step_size
        self.t, self.taken, self.loss = 0.0, 0, loss

    @property
    def total(self) -> int:
        """Steps in all if no further step is rejected or grows."""
        return self.taken + math.ceil((self._t_end - self.t) / self._length * (1.0 - 1e-12))

    def advance(self, theta: Tensor, move: Move) -> float:
        """Try steps until one is kept."""
        path, start = self._trajectory, theta.clone()
        while True:
            is_last = self.t + self._length >= self._t_end * (1.0 - 1e-12)
            t_next = self._t_end if is_last else self.t + self._length
            length = t_next - self.t
            move(t_next)
            self.loss = self._measure(t_next, theta)
            excess = self.loss - (path.loss[0] + t_next * max(path.delta_loss, 0.0))
            factor = self._control.factor(excess, max(abs(path.loss[0]), abs(path.loss1)))
            if factor >= 1.0 or self._length <= self._floor:
                self._length *= max(factor, 1.0)
                self.t, self.taken = t_next, self.taken + 1
                return t_next
            path.reject(t_next, self.loss)
            self._length = max(factor * length, self._floor)
            theta.copy_(start)

"""Where the flow of a merge stops."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_odem.arguments import check_choice, check_range
from lightning_odem.calibration import CalibrationObjective
from lightning_odem.flow import LowestPoint, Trajectory, scaled_time
from lightning_odem.methods.became import became_time
from lightning_odem.methods.sampling import hold_out

Follow = Callable[[float, CalibrationObjective, Callable[[float, Tensor], None] | None], Trajectory]


@dataclass(frozen=True)
class Path:
    """The flow of one merge before it is followed.

    Args:
        start: The merged model [d].
        incoming: The incoming model [d].
        t: Operating time of the utility weights.
        objective: The calibration loss.
        step_size: Step length h.
        integrate: Follows the flow, given the time to stop at, the loss whose gradient it takes, and who looks at its
            points.
        sum_: Adds up a tensor over the processes that share the model, in place; None if one process holds it.
    """

    start: Tensor
    incoming: Tensor
    t: float
    objective: CalibrationObjective
    step_size: float
    integrate: Follow
    sum_: Callable[[Tensor], None] | None = None

    def follow(self, end: float) -> Trajectory:
        """Follow the flow up to a time, with the gradients of all samples."""
        return self.integrate(end, self.objective, None)


class OperatingTime(ABC):
    """A rule for the time at which the flow of a merge stops.

    A task of weight 0 has time 0 by every rule: it changes nothing.
    """

    @abstractmethod
    def follow(self, path: Path) -> Trajectory:
        """Follow the flow and stop it; the trajectory ends where the merged model is."""


@dataclass(frozen=True)
class UtilityTime(OperatingTime):
    r"""The paper's rule: :math:`t_k = w_k / \sum_{j \le k} w_j` of the utility weights."""

    def follow(self, path: Path) -> Trajectory:
        """Follow the flow to the time of the weights."""
        return path.follow(path.t)


@dataclass(frozen=True)
class FixedTime(OperatingTime):
    """The same time in every merge, whatever the weights.

    Args:
        time: The time, in [0, 1].

    Raises:
        ValueError: If the time lies outside [0, 1].
    """

    time: float

    def __post_init__(self) -> None:
        check_range("time", self.time, 0, 1)

    def follow(self, path: Path) -> Trajectory:
        """Follow the flow to the fixed time."""
        return path.follow(float(self.time) if path.t else 0.0)


@dataclass(frozen=True)
class BecameTime(OperatingTime):
    """BECAME's rule: the minimum of a quadratic model of all tasks' losses on the segment between the two models.

    It takes one more gradient on every sample, see :func:`~lightning_odem.methods.became.became_time`.
    """

    def follow(self, path: Path) -> Trajectory:
        """Follow the flow to that minimum."""
        return path.follow(became_time(path.objective, path.start, path.incoming, path.t, path.sum_))


@dataclass(frozen=True)
class SearchedTime(OperatingTime):
    r"""The time of lowest loss on calibration samples that the gradients do not see.

    Candidates are a step length apart. They lie between the times that :math:`t_k` would be if the task's weight were
    ``factor`` times smaller and larger, so the odds :math:`t / (1 - t)` of old and new change by that factor at most.
    With 2 the flow goes to :math:`2t / (1 + t)`; for two equal tasks the candidates lie between 1/3 and 2/3. A task
    that alone has a weight has time 1.

    The flow is longer than with the paper's time, each candidate costs one pass over the held-out samples, and one more
    vector of the model's size is held. The report has the losses of all candidates.

    Args:
        factor: How much smaller and larger the weight may count, >= 1.
        holdout: Share of each task's samples that the gradients do not see, in (0, 1).

    Raises:
        ValueError: For a number outside its range; when merging, if no task has two calibration samples.
    """

    factor: float = 2.0
    holdout: float = 0.25

    def __post_init__(self) -> None:
        check_range("factor", self.factor, 1)
        check_range("holdout", self.holdout, 0, 1, open_low=True, open_high=True)

    def follow(self, path: Path) -> Trajectory:
        """Follow the flow to the last candidate and go back to the best one."""
        seen, unseen = hold_out(path.objective, self.holdout)
        first, last = (scaled_time(path.t, factor) for factor in (1 / self.factor, self.factor))
        lowest = LowestPoint(unseen.loss, first, last, path.step_size)
        trajectory = path.integrate(last, seen, lowest)
        lowest.write_(trajectory.theta)
        trajectory.cut(lowest.best_t)
        if trajectory.estimated:
            trajectory.loss[-1] = seen.loss(trajectory.theta)  # the loss of all samples, as at any end
        trajectory.held_out_t, trajectory.held_out_loss = lowest.t, lowest.loss
        return trajectory


OPERATING_TIMES: dict[str, type[OperatingTime]] = {
    "utility": UtilityTime,
    "search": SearchedTime,
    "became": BecameTime,
}


def resolve_operating_time(rule: str | float | OperatingTime) -> OperatingTime:
    """Make a rule from its name, with its defaults, or from a number; a rule is returned as it is.

    Raises:
        ValueError: For an unknown name, or a number outside [0, 1].

    Example:
        >>> resolve_operating_time("search"), resolve_operating_time(0.5)
        (SearchedTime(factor=2.0, holdout=0.25), FixedTime(time=0.5))
    """
    if isinstance(rule, OperatingTime):
        return rule
    if isinstance(rule, str):
        check_choice("operating_time, unless a number,", rule, OPERATING_TIMES)
        return OPERATING_TIMES[rule]()
    check_range("operating_time", rule, 0, 1)
    return FixedTime(rule)

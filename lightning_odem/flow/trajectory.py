"""What happened along a path: its losses, its damping, and how they compare with the theory."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from lightning_odem.flow.field import Velocity

_PER_STEP = ("alignment", "gamma", "alignment_ratio", "step_norm", "damped_share")
_OPTIONAL = (
    "rejected_t",
    "rejected_loss",
    "held_out_t",
    "held_out_loss",
    "scale",
    "scale_loss",
    "scale_taken",
    "average_loss",
    "descent_loss",
    "descent_taken",
)


@dataclass
class Trajectory:
    """The recorded path of one merge.

    ``t`` and ``loss`` have one entry per point (n steps, n + 1 points). The lists after them have one entry per step.

    Args:
        theta: The end of the path, shape [d].
        loss1: L(theta1), the incoming model's calibration loss.
        t: Times of the points, from 0 to the operating time.
        loss: Calibration loss at each point. If ``estimated``, the losses between the ends are each on one minibatch.
        alignment: <g, u> at the start of each step.
        gamma: Damping factor of each step; 1 is undamped. Like ``alignment_ratio`` and ``damped_share``, it is empty
            for dynamics that do not damp.
        alignment_ratio: ||P_g u|| / ||u|| of each step, which Theorem 3.3 needs below 1, with P_g the blockwise
            projection.
        step_norm: h ||v|| of each step, the length of its Euler move.
        damped_share: ||u - v|| / ||u|| of each step, see ``docs/methods.md``.
        gradient_evaluations: Gradients taken on the way.
        estimated: Whether the losses between the ends are estimates. Then barrier and envelope excess are measured at
            the ends only.
        rejected_t: Times reached by steps that were taken back, see :class:`~lightning_odem.flow.StepControl`.
        rejected_loss: Losses there.
        held_out_t: Candidates for the end, see :class:`~lightning_odem.flow.LowestPoint`; the path is recorded up to
            the chosen one.
        held_out_loss: Losses there on the held-out samples.
        scale: Scales tried in the search of an operating point, see :class:`~lightning_odem.methods.ODEMerge`.
        scale_loss: Losses there.
        scale_taken: The scale that was chosen; 0 is the running average.
        average_loss: The loss of the running average.
        descent_loss: Losses on held-out samples at the start of the gradient flow and after each of its pieces.
        descent_taken: Pieces that were kept.

    Example:
        >>> import torch
        >>> path = Trajectory(torch.zeros(2), loss1=1.0, t=[0.0, 0.5], loss=[2.0, 1.75])
        >>> path.delta_loss, path.chord, path.barrier
        (-1.0, [2.0, 1.5], 0.25)
        >>> path.envelope, path.envelope_excess
        ([2.0, 2.0], 0.0)
    """

    theta: Tensor
    loss1: float
    t: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    alignment: list[float] = field(default_factory=list)
    gamma: list[float] = field(default_factory=list)
    alignment_ratio: list[float] = field(default_factory=list)
    step_norm: list[float] = field(default_factory=list)
    damped_share: list[float] = field(default_factory=list)
    gradient_evaluations: int = 0
    estimated: bool = False
    rejected_t: list[float] = field(default_factory=list)
    rejected_loss: list[float] = field(default_factory=list)
    held_out_t: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    scale_loss: list[float] = field(default_factory=list)
    scale_taken: list[float] = field(default_factory=list)
    average_loss: list[float] = field(default_factory=list)
    descent_loss: list[float] = field(default_factory=list)
    descent_taken: list[float] = field(default_factory=list)

    def leave(self, h: float, velocity: Velocity) -> None:
        """Record a step of length ``h`` from the point recorded last."""
        self.alignment.append(velocity.alignment)
        self.gamma.append(velocity.gamma)
        self.alignment_ratio.append(velocity.alignment_ratio)
        self.step_norm.append(h * velocity.norm)
        self.damped_share.append(velocity.damped_share)

    def end(self, t: float, loss: float) -> None:
        """Record a point, which is the end of the path for now."""
        self.t.append(t)
        self.loss.append(loss)

    def reject(self, t: float, loss: float) -> None:
        """Record a step to time ``t`` that was taken back."""
        self.rejected_t.append(t)
        self.rejected_loss.append(loss)

    def cut(self, t: float) -> None:
        """Forget what came after the point of time ``t``."""
        steps = self.t.index(t)
        del self.t[steps + 1 :], self.loss[steps + 1 :]
        for name in _PER_STEP:
            del getattr(self, name)[steps:]

    @property
    def delta_loss(self) -> float:
        """L(theta1) - L(theta0), the loss budget of a whole path."""
        return self.loss1 - self.loss[0]

    @property
    def chord(self) -> list[float]:
        """Linear interpolation of the endpoint losses at the path's points, (1 - t) L(theta0) + t L(theta1)."""
        return [self.loss[0] + t * self.delta_loss for t in self.t]

    @property
    def envelope(self) -> list[float]:
        """Theorem 3.4's bound at the path's points, L(theta0) + t max(delta L, 0)."""
        return [self.loss[0] + t * max(self.delta_loss, 0.0) for t in self.t]

    @property
    def barrier(self) -> float:
        """Measured barrier B(theta): largest excess of the loss over the chord, on the part travelled (Def. 3.2)."""
        return max(self._measured(loss - chord for loss, chord in zip(self.loss, self.chord, strict=True)))

    @property
    def barrier_bound(self) -> float:
        """Theorem 3.4's bound on the barrier, max(L(theta0) - L(theta1), 0) (eq. 17)."""
        return max(-self.delta_loss, 0.0)

    @property
    def envelope_excess(self) -> float:
        """How far the loss rose above the envelope: 0 for the exact flow, of the order of the step size here."""
        return max(self._measured(loss - bound for loss, bound in zip(self.loss, self.envelope, strict=True)))

    def as_dict(self) -> dict[str, list[float]]:
        """The recorded lists by name, as they go into a report; lists of options only if they are not empty."""
        lists = {name: list(getattr(self, name)) for name in ("t", "loss", *_PER_STEP)}
        return lists | {name: list(getattr(self, name)) for name in _OPTIONAL if getattr(self, name)}

    def _measured(self, values: Iterable[float]) -> list[float]:
        values = list(values)
        return [values[0], values[-1]] if self.estimated else values

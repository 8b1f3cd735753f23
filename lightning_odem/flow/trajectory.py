"""What happened along a path: its losses, its damping, and how they compare with the theory."""

from dataclasses import dataclass, field

from torch import Tensor

from lightning_odem.flow.field import Velocity


@dataclass
class Trajectory:
    r"""The recorded path of one merge.

    ``t`` and ``loss`` have one entry per point (n steps, n + 1 points); the lists after them one per step.

    Args:
        theta: The end of the path, shape [d].
        loss1: L(theta1), the incoming model's calibration loss.
        t: Times of the points, from 0 to the operating time.
        loss: Calibration loss at each point.
        alignment: <g, u> at the start of each step.
        gamma: Damping factor of each step, one for all blocks; 1 is undamped. Empty for dynamics that do not damp the
            gradient's direction.
        alignment_ratio: ||P_g u|| / ||u|| of each step, the quantity Theorem 3.3 needs below 1, with P_g the blockwise
            projection; empty likewise. Where every entry is a block it is the transport's share in entries with a
            gradient, which is 1 for most losses; ``damped_share`` tells more there.
        step_norm: h ||v|| of each step, the length of its Euler move.
        damped_share: ||u - v|| / ||u|| of each step, how much of the transport was taken out; empty likewise. If it
            stays below some s < 1 the exact flow arrives at theta1, whatever the blocks: then
            <theta1 - theta, v> >= (1 - s) ||theta1 - theta||^2 / (1 - t).
        gradient_evaluations: Gradients taken on the way.

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

    def record(self, t: float, loss: float, h: float, velocity: Velocity) -> None:
        """Note a step of length ``h`` that starts at time ``t``."""
        self.t.append(t)
        self.loss.append(loss)
        self.alignment.append(velocity.alignment)
        self.gamma.append(velocity.gamma)
        self.alignment_ratio.append(velocity.alignment_ratio)
        self.step_norm.append(h * velocity.norm)
        self.damped_share.append(velocity.damped_share)

    def end(self, t: float, loss: float) -> None:
        """Note the end of the path."""
        self.t.append(t)
        self.loss.append(loss)

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
        return max(loss - chord for loss, chord in zip(self.loss, self.chord, strict=True))

    @property
    def barrier_bound(self) -> float:
        """Theorem 3.4's bound on the barrier, max(L(theta0) - L(theta1), 0) (eq. 17)."""
        return max(-self.delta_loss, 0.0)

    @property
    def envelope_excess(self) -> float:
        """How far the loss rose above the envelope: 0 for the exact flow, of the order of the step size here."""
        return max(loss - bound for loss, bound in zip(self.loss, self.envelope, strict=True))

    def as_dict(self) -> dict[str, list[float]]:
        """The recorded lists by name, as they go into a report."""
        names = ("t", "loss", "alignment", "gamma", "alignment_ratio", "step_norm", "damped_share")
        return {name: list(getattr(self, name)) for name in names}

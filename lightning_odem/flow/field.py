"""Velocity fields between two models: transport, and its rectification against a loss (Section 3.2 of the paper)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Vectors are walked in blocks that fit the cache: no temporary is ever as long as a model.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Velocity:
    """A velocity ``v = alpha (theta1 - theta) - damping grad``, kept as two scalars instead of a vector of its own.

    Args:
        theta: Point at which the field was evaluated, shape [d].
        theta1: Incoming model, shape [d].
        grad: Loss gradient at ``theta``, shape [d].
        alpha: Transport rate 1 / (1 - t).
        damping: How much of the gradient is taken out of the transport, (1 - gamma) <g, u> / ||g||^2.
        alignment: Inner product <g, u> of gradient and transport field: the loss change per unit time without damping.
        gamma: Damping factor of eq. 12-14; 1 leaves the transport as it is.
        alignment_ratio: ||P_g u|| / ||u||, the share of the transport along the gradient (0 where either vanishes).
        norm: ||v||.
    """

    theta: Tensor
    theta1: Tensor
    grad: Tensor
    alpha: float
    damping: float
    alignment: float
    gamma: float
    alignment_ratio: float
    norm: float

    def add_to(self, out: Tensor, scale: float) -> None:
        """Add ``scale * v`` to ``out`` in place; ``out`` may be ``theta`` itself."""
        for target, theta, theta1, grad in _blocks(out, self.theta, self.theta1, self.grad):
            target.add_(theta1 - theta, alpha=scale * self.alpha)
            if self.damping:
                target.add_(grad, alpha=-scale * self.damping)


class Field(Protocol):
    """Anything that gives the velocity at a point; ``delta_loss`` is L(theta1) - L(theta0), fixed for a whole path."""

    def __call__(self, t: float, theta: Tensor, theta1: Tensor, grad: Tensor, delta_loss: float) -> Velocity:
        """Evaluate the field at time ``t`` in [0, 1) and point ``theta``."""
        ...


class TransportField:
    """The straight line between two models as a flow, u_t(theta) = (theta1 - theta) / (1 - t) (eq. 10).

    It ignores the loss: stopping it at t gives (1 - t) theta0 + t theta1, so a stream merged with it and eq. 18's
    operating times is the utility-weighted running average.
    """

    def gamma(self, alignment: float, delta_loss: float) -> float:
        """Return 1: nothing is damped."""
        return 1.0

    def __call__(self, t: float, theta: Tensor, theta1: Tensor, grad: Tensor, delta_loss: float) -> Velocity:
        """Evaluate the field; one pass over the vectors, sums in fp64.

        Args:
            t: Time in [0, 1).
            theta: Current point, shape [d].
            theta1: Incoming model, shape [d].
            grad: Loss gradient at ``theta``, shape [d]; it is kept by the result and never written to.
            delta_loss: L(theta1) - L(theta0).
        """
        alpha = 1.0 / (1.0 - t)
        distance_grad, grad_grad, distance_distance = _inner_products(theta, theta1, grad)
        alignment = alpha * distance_grad
        gamma = self.gamma(alignment, delta_loss)
        # Without a gradient there is no direction to damp: the projection onto it is zero.
        along = alignment / grad_grad if grad_grad > 0.0 else 0.0
        damping = (1.0 - gamma) * along
        transport_square = alpha**2 * distance_distance
        cosine = abs(alignment) / (grad_grad * transport_square) ** 0.5 if grad_grad * transport_square > 0.0 else 0.0
        square = transport_square - 2.0 * damping * alignment + damping**2 * grad_grad
        return Velocity(
            theta, theta1, grad, alpha, damping, alignment, gamma, min(cosine, 1.0), max(square, 0.0) ** 0.5
        )


class RectifiedField(TransportField):
    r"""The paper's field: the transport with its loss-increasing part damped (eq. 11-14).

    With g the loss gradient and u the transport, :math:`v = u_\perp + \gamma u_\parallel`, where :math:`u_\parallel`
    is the projection of u onto g and

    .. math:: \gamma = 1 \text{ if } \langle g, u\rangle \le 0, \text{ else }
        \mathrm{clip}(\Delta L / \langle g, u\rangle, 0, 1).

    So the loss rises no faster than :math:`\max(\Delta L, 0)` per unit time, which is Theorem 3.4.

    Example:
        >>> import torch
        >>> field = RectifiedField()
        >>> theta, theta1 = torch.zeros(2), torch.ones(2)
        >>> field(0.0, theta, theta1, torch.tensor([-1.0, 0.0]), delta_loss=-1.0).gamma  # downhill: free
        1.0
        >>> field(0.0, theta, theta1, torch.tensor([4.0, 0.0]), delta_loss=1.0).gamma  # 4 uphill, 1 allowed
        0.25
        >>> field(0.0, theta, theta1, torch.tensor([4.0, 0.0]), delta_loss=-1.0).gamma  # no rise allowed
        0.0
    """

    def gamma(self, alignment: float, delta_loss: float) -> float:
        """Damping factor for <g, u> = ``alignment`` and the loss difference of the endpoints (eq. 13 and 14)."""
        if alignment <= 0.0:
            return 1.0
        return min(max(delta_loss / alignment, 0.0), 1.0)


def _blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(vector.split(_BLOCK) for vector in vectors), strict=True)


def _inner_products(theta: Tensor, theta1: Tensor, grad: Tensor) -> tuple[float, float, float]:
    """<theta1 - theta, g>, <g, g> and ||theta1 - theta||^2 in one pass, accumulated in fp64."""
    # Apple's GPU has no fp64.
    accumulate = torch.float32 if theta.device.type == "mps" else torch.float64
    sums = torch.zeros(3, dtype=accumulate, device=theta.device)
    for point, target, gradient in _blocks(theta, theta1, grad):
        distance = (target - point).to(accumulate)
        gradient = gradient.to(accumulate)
        sums += torch.stack([distance.dot(gradient), gradient.dot(gradient), distance.dot(distance)])
    distance_grad, grad_grad, distance_distance = sums.tolist()
    return distance_grad, grad_grad, distance_distance

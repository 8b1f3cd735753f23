"""Velocity fields between two models: transport, and its rectification against a loss (Section 3.2 of the paper)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_odem.arguments import shown
from lightning_odem.flow.blocks import Blocks, Coordinates, Projection, Segments, SumOverShards, WholeVector, alone
from lightning_odem.flow.deferred import Deferred


@dataclass(frozen=True)
class Velocity:
    """A velocity, kept as a few numbers instead of a vector of its own: the transport without its damped part.

    In block b it is ``alpha (theta1 - theta)_b - damping_b grad_b``. If every entry is a block, it is ``alpha (theta1 -
    theta)_i``, times ``1 - damping`` for entries along which the loss rises.

    Args:
        theta: Point at which the field was evaluated, shape [d].
        theta1: Incoming model, shape [d].
        grad: Loss gradient at ``theta``, shape [d].
        alpha: Transport rate 1 / (1 - t).
        damping: How much of the gradient is taken out of the transport, (1 - gamma) max(<g_b, u_b>, 0) / ||g_b||^2: one
            number, or one per block. It is (1 - gamma) if every entry is a block.
        alignment: Inner product <g, u> of gradient and transport field: the loss change per unit time without damping.
        gamma: Damping factor of eq. 12-14; 1 leaves the transport as it is.
        alignment_ratio: ||P_g u|| / ||u||, the share of the transport along the gradient (0 if either vanishes). The
            projection is onto the gradient's parts, block by block.
        norm: ||v||.
        damped_share: ||u - v|| / ||u||, the share of the transport that is taken out (0 if u vanishes).
        blocks: How the vectors are cut into blocks; one block unless :class:`RectifiedField` says otherwise.
    """

    theta: Tensor
    theta1: Tensor
    grad: Tensor
    alpha: float
    damping: float | Tensor
    alignment: float
    gamma: float
    alignment_ratio: float
    norm: float
    damped_share: float = 0.0
    blocks: Blocks = WholeVector()

    def add_to(self, out: Tensor, scale: float) -> None:
        """Add ``scale * v`` to ``out`` in place; ``out`` may be ``theta`` itself."""
        self.blocks.move_(out, self, scale)


FromDelta = Callable[[float], Velocity]
"""The velocity as a function of L(theta1) - L(theta0)."""


class Field(Protocol):
    """Anything that gives the velocity at a point; ``delta_loss`` is L(theta1) - L(theta0), fixed for a whole path."""

    def __call__(self, t: float, theta: Tensor, theta1: Tensor, grad: Tensor, delta_loss: float) -> Velocity:
        """Evaluate the field at time ``t`` in [0, 1) and point ``theta``."""
        ...


class TransportField:
    """The flow along the straight line between two models, u_t(theta) = (theta1 - theta) / (1 - t) (eq. 10).

    It ignores the loss. Stopping it at t gives (1 - t) theta0 + t theta1. So a stream that is merged with it at the
    operating times of eq. 18 gives the utility-weighted running average.
    """

    _blocks: Blocks = WholeVector()

    def gamma(self, rise: float, delta_loss: float) -> float:
        """Return 1: nothing is damped."""
        return 1.0

    def __call__(self, t: float, theta: Tensor, theta1: Tensor, grad: Tensor, delta_loss: float) -> Velocity:
        """Evaluate the field; one pass over the vectors, sums in fp64.

        Args:
            t: Time in [0, 1).
            theta: Current point, shape [d].
            theta1: Incoming model, shape [d].
            grad: Loss gradient at ``theta``, shape [d]; the result keeps it and never writes to it.
            delta_loss: L(theta1) - L(theta0).
        """
        return self.begin(t, theta, theta1, grad).result()(delta_loss)

    def begin(self, t: float, theta: Tensor, theta1: Tensor, grad: Tensor) -> Deferred[FromDelta]:
        """Do what an evaluation does on the device; the velocity is a function of ``delta_loss`` once that is read."""
        alpha = 1.0 / (1.0 - t)
        found = self._blocks.project(theta, theta1, grad, alpha)
        return found.then(lambda projection: partial(self._velocity, theta, theta1, grad, alpha, projection))

    def _velocity(
        self, theta: Tensor, theta1: Tensor, grad: Tensor, alpha: float, found: Projection, delta_loss: float
    ) -> Velocity:
        gamma = self.gamma(found.rise, delta_loss)
        norm_square = found.transport_square - (1.0 - gamma**2) * found.uphill_square
        return Velocity(
            theta,
            theta1,
            grad,
            alpha,
            damping=(1.0 - gamma) * found.uphill,
            alignment=found.alignment,
            gamma=gamma,
            alignment_ratio=_share(found.along_square, found.transport_square),
            norm=max(norm_square, 0.0) ** 0.5,
            damped_share=(1.0 - gamma) * _share(found.uphill_square, found.transport_square),
            blocks=self._blocks,
        )


class RectifiedField(TransportField):
    r"""The paper's field: the transport with its loss-increasing part damped (eq. 11-14), as a whole or block by block.

    With the loss gradient :math:`g_b` and the transport :math:`u_b` in block b, :math:`a_b = \langle g_b,u_b\rangle`
    and the projection :math:`P_b` onto :math:`g_b`,

    .. math:: v_b = u_b - (1 - \gamma) P_b u_b \text{ if } a_b > 0, \text{ else } u_b, \qquad
        \gamma = \mathrm{clip}\left(\max(\Delta L, 0) / \textstyle\sum_b \max(a_b, 0),\ 0,\ 1\right),

    and :math:`\gamma = 1` if no :math:`a_b` is positive. One block over everything is the paper's rule. Finer blocks
    take more out. Theorem 3.4 holds for any, see ``docs/methods.md``.

    No kind of block needs a vector of the model's size. Given lengths are not available on Apple's GPU. If processes
    hold shards of the vectors, an evaluation sums over them once.

    Args:
        blocks: ``"vector"``, one block; ``"coordinate"``, one block per entry; or the lengths of consecutive blocks,
            integers >= 1 of shape [B] that sum to d.
        sum_: Sums fp64 numbers on the CPU over all shards, in place. Every process evaluates the field equally often.
        split: Which lengths continue in other shards, bool of shape [B]. All shards list these blocks in the same
            order; a shard that holds nothing of one gives length 0.

    Raises:
        ValueError: For blocks of another kind; in evaluations, if they do not fit the vectors.

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
        >>> slope = torch.tensor([4.0, -4.0])  # 4 uphill, 4 downhill
        >>> [RectifiedField(blocks)(0.0, theta, theta1, slope, 1.0).gamma for blocks in ("vector", "coordinate")]
        [1.0, 0.25]
    """

    def __init__(
        self, blocks: str | Tensor = "vector", sum_: SumOverShards = alone, split: Tensor | None = None
    ) -> None:
        if isinstance(blocks, Tensor):
            least = torch.ones_like(blocks) if split is None else (~split).to(blocks)
            is_empty = not blocks.numel() and sum_ is alone
            if blocks.dim() != 1 or blocks.is_floating_point() or is_empty or (blocks < least).any():
                raise ValueError(f"Lengths of blocks are integers >= 1 of shape [B], got {blocks}.")
            self._blocks = Segments(blocks, sum_, split)
        elif isinstance(blocks, str) and blocks in ("vector", "coordinate"):
            self._blocks = WholeVector(sum_) if blocks == "vector" else Coordinates(sum_)
        else:
            raise ValueError(f"Blocks are 'vector', 'coordinate' or a tensor of lengths, got {shown(blocks)}.")

    def gamma(self, rise: float, delta_loss: float) -> float:
        """Damping factor (eq. 13 and 14).

        Args:
            rise: Sum of the positive <g_b, u_b>; for one block <g, u>, or 0 if that is negative.
            delta_loss: L(theta1) - L(theta0).
        """
        if rise <= 0.0:
            return 1.0
        return min(max(delta_loss / rise, 0.0), 1.0)


def begin(field: Field, t: float, theta: Tensor, theta1: Tensor, grad: Tensor) -> Deferred[FromDelta]:
    """Begin the evaluation of any field. One that is only called is called once the loss is known."""
    if isinstance(field, TransportField) and type(field).__call__ is TransportField.__call__:
        return field.begin(t, theta, theta1, grad)
    return Deferred(theta.new_empty(0), lambda nothing: partial(field, t, theta, theta1, grad))


def _share(part_square: float, square: float) -> float:
    return min((part_square / square) ** 0.5, 1.0) if square > 0.0 else 0.0

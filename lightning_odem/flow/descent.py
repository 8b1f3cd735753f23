"""Gradient flow down the loss, in pieces."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_odem.arguments import check_integer, check_range
from lightning_odem.flow.blocks import piece_on
from lightning_odem.flow.solver import LossAndGrad, NonFiniteLossError


class Descent:
    r"""The flow :math:`\dot\theta = -a(t)\, D g` from t = 0 to 1, followed in steps of equal length.

    :math:`D g` is Adam's normalised gradient: the running mean of the gradients over the root of their running mean
    square, with entries of about 1 where gradients agree and near 0 where they are noise. The speed falls linearly to
    zero,

    .. math:: a(t) = 2 \ell (1 - t), \qquad \int_0^1 a(t)\, dt = \ell,

    so that the last gradients correct what the noise of the first ones has left. No entry moves by much more than
    :math:`\ell`.

    Besides the point it holds a gradient and Adam's two moments. A step goes through the vectors in pieces.

    Args:
        theta: The point [d], moved in its memory.
        length: Length :math:`\ell` of the whole descent, in units of the weights, >= 0.
        steps: Steps of the whole descent, at least 1.
        betas: Adam's decay rates. 0.99 instead of its usual 0.999 because a path has tens of steps, not thousands.

    Raises:
        ValueError: If the length is negative or there is no step.

    Example:
        >>> point = torch.zeros(2)
        >>> descent = Descent(point, length=0.25, steps=4)
        >>> descent.follow(lambda theta: (float(theta.sum()), torch.ones(2)), steps=4)  # always uphill by 1
        >>> point
        tensor([-0.2500, -0.2500])
    """

    def __init__(self, theta: Tensor, length: float, steps: int, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        try:
            self._length, self._steps = check_range("length", length, 0), check_integer("steps", steps, 1)
        except ValueError as error:
            raise ValueError(f"A descent needs a length >= 0 and at least one step: {error}") from error
        for decay in betas:
            check_range("betas", decay, 0, 1, open_high=True)
        self.taken, self._theta = 0, theta
        # Adam's temporaries are as long as its parameters: pieces keep them in the cache of a CPU.
        self._pieces = theta.split(piece_on(theta.device))
        self._adam = torch.optim.Adam(self._pieces, betas=betas, eps=1e-12, foreach=False)

    def follow(self, loss_and_grad: LossAndGrad, steps: int, on_step: Callable[[int, int], None] | None = None) -> None:
        """Take the next steps.

        Args:
            loss_and_grad: Loss and gradient [d] at a point, for example on a random minibatch.
            steps: Number of steps.
            on_step: Called with (steps taken, steps of the whole descent).

        Raises:
            NonFiniteLossError: If a loss, or the point afterwards, is not finite.
        """
        for _ in range(steps):
            loss, grad = loss_and_grad(self._theta)
            for piece, of_piece in zip(self._pieces, grad.split(piece_on(grad.device)), strict=True):
                piece.grad = of_piece
            if not torch.isfinite(torch.as_tensor(loss)):
                raise NonFiniteLossError(f"the loss is {loss}", self.taken, self.taken / self._steps)
            # The speed in the middle of the step, which is exact for a linearly falling speed.
            middle = (self.taken + 0.5) / self._steps
            self._adam.param_groups[0]["lr"] = 2.0 * self._length / self._steps * (1.0 - middle)
            self._adam.step()
            for piece in self._pieces:
                piece.grad = None
            del grad, of_piece  # before the next gradient comes
            self.taken += 1
            if on_step is not None:
                on_step(self.taken, self._steps)
        if not self._theta.isfinite().all():
            raise NonFiniteLossError("a gradient or a weight is not finite", self.taken, self.taken / self._steps)

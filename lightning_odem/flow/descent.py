"""Descent of the loss beside the transport."""

import torch
from torch import Tensor

from lightning_odem.flow.field import Velocity
from lightning_odem.flow.solver import Evaluate, Solver


class AdaptiveDescent:
    r"""A one-step rule that also goes down the loss, by Adam, with the gradient that the field is evaluated with.

    The flow becomes :math:`\dot\theta = v_t(\theta) - a(t)\, D g`, with :math:`D g` Adam's normalised gradient: its
    running mean over the root of its running mean square, entries of about 1 where gradients agree and near 0 where
    they are noise. The speed falls linearly to zero at the end of the path,

    .. math:: a(t) = \frac{2 \ell}{T} \left(1 - \frac{t}{T}\right), \qquad \int_0^T a(t)\, dt = \ell,

    so that the last gradients settle what the noise of the first ones has left. No entry moves by much more than
    :math:`\ell`. Adam starts afresh with every path.

    With exact gradients and no running mean, :math:`\langle g, -a D g\rangle \le 0` as D is diagonal and positive: the
    bound of Theorem 3.4 holds as before. Means over random minibatches keep to it on average only.

    Two more vectors of the model's size are held, Adam's moments, and two of its temporaries within a step.

    Args:
        rule: The rule of the transport.
        length: Length :math:`\ell` of the descent, in units of the weights, >= 0.
        end: Operating time T in (0, 1].
        betas: Adam's decay rates. 0.99 instead of its usual 0.999 because a path has tens of steps, not thousands.

    Raises:
        ValueError: If the length is negative.

    Example:
        >>> import torch
        >>> from lightning_odem.flow import Euler, integrate
        >>> loss_and_grad = lambda theta: (float(theta.sum()), torch.ones(2))  # always uphill by 1
        >>> rule = AdaptiveDescent(Euler(), length=0.25, end=0.5)
        >>> integrate(torch.zeros(2), torch.zeros(2), loss_and_grad, 0.5, solver=rule).theta
        tensor([-0.2500, -0.2500])
    """

    order = 1

    def __init__(self, rule: Solver, length: float, end: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        if length < 0.0:
            raise ValueError(f"The length of a descent must not be negative, got length={length}.")
        self._rule, self._length, self._end, self._betas = rule, length, end, betas
        self._adam: torch.optim.Adam | None = None

    def step(self, theta: Tensor, velocity: Velocity, t: float, h: float, evaluate: Evaluate) -> None:
        """Take the rule's step and one of the descent."""
        self._rule.step(theta, velocity, t, h, evaluate)
        if self._adam is None or t == 0.0:
            self._adam = torch.optim.Adam([theta], betas=self._betas, eps=1e-12, foreach=False)
        # The speed in the middle of the step: exact for one that falls linearly.
        self._adam.param_groups[0]["lr"] = 2.0 * self._length * h / self._end * (1.0 - (t + h / 2) / self._end)
        theta.grad = velocity.grad
        self._adam.step()
        theta.grad = None

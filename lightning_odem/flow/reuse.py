"""Several steps with one gradient."""

from torch import Tensor

from lightning_odem.arguments import check_integer
from lightning_odem.flow.field import Velocity
from lightning_odem.flow.solver import Evaluate, Solver, resolve_solver


class ReusedGradient:
    r"""A one-step rule that goes from t to t + h in several equal steps, all with the gradient taken at t.

    The transport is computed at each new point, and the gradient's share is taken out of it again; only g is old. If
    the gradient hardly changes along h, this gives the path of the shorter steps at the cost of the longer one.

    Args:
        rule: The rule of each step, or its name. A rule that takes further gradients, such as Heun's, gets the same
            gradient instead.
        times: Steps per gradient, >= 1. With 4 a path costs a quarter of the gradients.

    Raises:
        ValueError: If ``times`` is below 1, or the rule is unknown.
    """

    order = 1

    def __init__(self, rule: str | Solver = "euler", times: int = 2) -> None:
        self.rule, self.times = resolve_solver(rule), check_integer("times", times, 1)

    def __repr__(self) -> str:
        return f"ReusedGradient({self.rule!r}, times={self.times})"

    def step(self, theta: Tensor, velocity: Velocity, t: float, h: float, evaluate: Evaluate) -> None:
        """Take the steps."""
        gradient, length = velocity.grad, h / self.times

        def with_same_gradient(t: float, point: Tensor, grad: Tensor | None = None) -> Velocity:
            return evaluate(t, point, gradient)

        for part in range(self.times):
            start = t + part * length
            if part:
                velocity = with_same_gradient(start, theta)
            self.rule.step(theta, velocity, start, length, with_same_gradient)

"""One integration loop, and the one-step rules it can use."""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from lightning_odem.arguments import LEAST_STEP, check_range, shown
from lightning_odem.flow.control import ControlledSteps, FixedSteps, StepControl, Steps
from lightning_odem.flow.deferred import Deferred, GradientOverflowError, fetch, settle
from lightning_odem.flow.field import Field, RectifiedField, Velocity, begin
from lightning_odem.flow.trajectory import Trajectory

LossAndGrad = Callable[[Tensor], tuple[float | Tensor | Deferred[float], Tensor]]


class Evaluate(Protocol):
    """Give the velocity at any time and point; this costs one gradient unless ``grad`` is given in its place."""

    def __call__(self, t: float, point: Tensor, grad: Tensor | None = None) -> Velocity:
        """Evaluate the field."""
        ...


class NonFiniteLossError(FloatingPointError):
    """The loss, its gradient or the distance between the models is not a finite number somewhere on the path.

    Args:
        what: The quantity that is not finite, with its value.
        step: Index of the integration step.
        t: Time of that step.
    """

    def __init__(self, what: str, step: int, t: float) -> None:
        super().__init__(f"{what} at step {step} (t = {t:.6g}) of the path; nothing was merged.")
        self.what, self.step, self.t = what, step, t


class Solver(Protocol):
    """A one-step rule: moves ``theta`` in place from t to t + h, given the velocity at its start."""

    order: int

    def step(self, theta: Tensor, velocity: Velocity, t: float, h: float, evaluate: Evaluate) -> None:
        """Take one step; ``evaluate(t, theta)`` gives the velocity anywhere else and costs one gradient."""
        ...


class Euler:
    """Explicit Euler, the paper's choice (Algorithm 1): order 1, one gradient per step."""

    order = 1

    def __repr__(self) -> str:
        return "Euler()"

    def step(self, theta: Tensor, velocity: Velocity, t: float, h: float, evaluate: Evaluate) -> None:
        """Move ``theta`` to theta + h v."""
        velocity.add_to(theta, h)


class Heun:
    """Heun's explicit trapezoidal rule: order 2 where the field is smooth, two gradients and two more vectors."""

    order = 2

    def __repr__(self) -> str:
        return "Heun()"

    def step(self, theta: Tensor, velocity: Velocity, t: float, h: float, evaluate: Evaluate) -> None:
        """Move ``theta`` to theta + h (v + v') / 2 with v' taken at the end of an Euler step."""
        predicted = theta.clone()
        velocity.add_to(predicted, h)
        correction = evaluate(t + h, predicted)
        velocity.add_to(theta, h / 2)
        correction.add_to(theta, h / 2)


SOLVERS: dict[str, type[Solver]] = {"euler": Euler, "heun": Heun}


def integrate(
    theta0: Tensor,
    theta1: Tensor,
    loss_and_grad: LossAndGrad,
    t_end: float,
    *,
    step_size: float = 0.05,
    field: Field | None = None,
    solver: str | Solver = "euler",
    loss: Callable[[Tensor], float | Tensor] | None = None,
    out: Tensor | None = None,
    on_step: Callable[[int, int], None] | None = None,
    control: StepControl | None = None,
    estimated: bool = False,
    observe: Callable[[float, Tensor], None] | None = None,
) -> Trajectory:
    r"""Follow the flow from the merged model towards the incoming one and stop at the operating time.

    Integrates :math:`\dot\theta = v_t(\theta)`. The last step is shortened so that the path ends exactly at ``t_end``.
    A path to t = 1 ends in ``theta1`` (Theorem 3.3), regardless of the field.

    The loop holds three vectors of length d: the point, ``theta1`` and one gradient. Heun holds two more, ``control``
    one.

    Args:
        theta0: Merged model, shape [d], floating point.
        theta1: Incoming model, of the same shape, dtype and device.
        loss_and_grad: Loss and gradient [d] at a point. Models and gradients are not modified.
        t_end: Operating time in [0, 1].
        step_size: Step length h in (0, 1]; 0.05 is the paper's (Table 4: flat from 0.001 to 0.1).
        field: Velocity field, :class:`RectifiedField` unless given.
        solver: ``"euler"`` (the paper's), ``"heun"`` or a :class:`Solver`.
        loss: Loss without gradient, for ``theta1`` and the path's end; by default that of ``loss_and_grad``.
        out: Vector to integrate in; giving ``theta0`` itself saves one vector.
        on_step: Called with (steps done, all steps) before the first and after every step.
        control: Lets the loss decide on the lengths of the steps after the first; by default all are equal.
        estimated: Whether ``loss_and_grad`` estimates on minibatches; then the losses at both ends come from ``loss``.
        observe: Called with (time, point) at every point, which it must not modify.

    Returns:
        The trajectory; ``trajectory.theta`` has the dtype of ``theta0``.

    Raises:
        ValueError: For numbers out of range, an unknown solver, vectors that do not match, or estimates without
            ``loss``.
        NonFiniteLossError: If a loss, a gradient or the distance between the models is not finite.

    Example:
        >>> import torch
        >>> loss_and_grad = lambda theta: (0.5 * theta.dot(theta), theta)
        >>> path = integrate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), loss_and_grad, t_end=0.5)
        >>> len(path.gamma), path.t[-1], path.envelope_excess < 0.01
        (10, 0.5, True)
    """
    _check_problem(theta0, theta1, t_end, step_size)
    field = field if field is not None else RectifiedField()
    rule = resolve_solver(solver)
    if estimated and loss is None:
        raise ValueError("With estimated gradients the loss itself is needed as well: give loss=.")
    evaluate_loss = loss if loss is not None else (lambda point: settle(partial(loss_and_grad, point))[0])
    theta = theta0.clone() if out is None else out.copy_(theta0)

    def measure(t: float, point: Tensor, what: str = "the loss") -> float:
        value = float(evaluate_loss(point))
        _check_finite(what, value, len(trajectory.gamma), t)
        return value

    def differentiate(t: float, point: Tensor, tell: Callable[[float], None] = lambda loss: None) -> Velocity:
        """The velocity at a point; the loss there is told before the velocity is made with the change of loss."""
        found, grad = loss_and_grad(point)
        loss, begun = Deferred.of(found), begin(field, t, point, theta1, grad)
        fetch(loss, begun)  # the one time in a step that the host waits for the device
        try:
            value = loss.result()
        except GradientOverflowError as overflow:
            del grad, begun
            value, grad = settle(overflow.again)
            begun = begin(field, t, point, theta1, grad)
        trajectory.gradient_evaluations += 1
        _check_finite("the loss", value, len(trajectory.gamma), t)
        tell(value)
        return checked(t, begun.result()(trajectory.delta_loss))

    def evaluate(t: float, point: Tensor, grad: Tensor | None = None) -> Velocity:
        if grad is None:
            return differentiate(t, point)
        return checked(t, field(t, point, theta1, grad, trajectory.delta_loss))

    def checked(t: float, velocity: Velocity) -> Velocity:
        # If no upward move is allowed, an infinite slope shows in the alignment only.
        for name, number in (("norm", velocity.norm), ("alignment", velocity.alignment)):
            _check_finite(f"the velocity's {name}, so a gradient or a weight,", number, len(trajectory.gamma), t)
        return velocity

    def move(velocity: Velocity, t: float, t_next: float) -> None:
        if t_next < 1.0:
            rule.step(theta, velocity, t, t_next - t, evaluate)
        else:
            theta.copy_(theta1)

    trajectory = Trajectory(theta, loss1=float(evaluate_loss(theta1)), estimated=estimated)
    _check_finite("the loss of the incoming model", trajectory.loss1, 0, 1.0)
    loss0 = measure(0.0, theta) if estimated else None
    steps: Steps = FixedSteps(t_end, step_size, loss0)
    if control is not None:
        steps = ControlledSteps(t_end, step_size, control, measure, trajectory, loss0)

    def arrive(loss: float) -> None:
        trajectory.end(steps.t, loss if steps.loss is None else steps.loss)

    if on_step is not None:
        on_step(0, steps.total)
    while steps.t < t_end:
        t = steps.t
        if observe is not None:
            observe(t, theta)
        velocity = differentiate(t, theta, arrive)
        t_next = steps.advance(theta, partial(move, velocity, t))
        trajectory.leave(t_next - t, velocity)
        # Free the gradient before the next one comes, so that one vector less is held.
        del velocity
        if on_step is not None:
            on_step(steps.taken, steps.total)
    if observe is not None:
        observe(t_end, theta)
    trajectory.end(t_end, measure(t_end, theta, "the loss at the end") if steps.loss is None else steps.loss)
    return trajectory


def _check_problem(theta0: Tensor, theta1: Tensor, t_end: float, step_size: float) -> None:
    check_range("The operating time t_end", t_end, 0, 1)
    check_range("step_size", step_size, 0, 1, open_low=True)
    if t_end / step_size > 1 / LEAST_STEP:
        raise ValueError(
            f"A path has at most {1 / LEAST_STEP:.0f} steps; choose a longer one than step_size={step_size}."
        )
    found = [(tuple(vector.shape), vector.dtype, str(vector.device)) for vector in (theta0, theta1)]
    if found[0] != found[1]:
        raise ValueError(f"theta0 and theta1 must agree in shape, dtype and device, got {found[0]} and {found[1]}.")
    if theta0.dim() != 1 or not theta0.is_floating_point():
        raise ValueError(f"The flow runs on flat floating-point vectors, got shape {found[0][0]} of {found[0][1]}.")


def resolve_solver(solver: str | Solver) -> Solver:
    """Make a solver from its name in :data:`SOLVERS`; a solver is returned as it is.

    Raises:
        ValueError: For an unknown name.
    """
    if not isinstance(solver, str):
        if not callable(getattr(solver, "step", None)):
            raise ValueError(
                f"A solver is one of {', '.join(sorted(SOLVERS))} or has a method step, got {shown(solver)}."
            )
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"Unknown solver {solver!r}; the solvers are {', '.join(sorted(SOLVERS))}.")
    return SOLVERS[solver]()


def _check_finite(what: str, value: float, step: int, t: float) -> None:
    if not math.isfinite(value):
        raise NonFiniteLossError(f"{what} is {value}", step, t)

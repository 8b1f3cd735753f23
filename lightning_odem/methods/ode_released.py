"""ODE-M as its authors released it: per-task constraints, a descent share and a line search instead of gamma."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lightning_odem.arguments import check_flag, check_range, check_step
from lightning_odem.flow import NonFiniteLossError, Trajectory, TransportField
from lightning_odem.flow.constraints import project_
from lightning_odem.flow.largest import admit, largest
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.linalg import norm
from lightning_odem.methods.needs import Calibration
from lightning_odem.methods.refinement import TaskLosses, refine

# The constants of the released code that nobody is expected to change.
_PROBE_BATCHES = 8
_EXCESS_TASKS = _SENSITIVE_TASKS = 2
_LARGEST_DESCENT = 1e6
_BACKTRACK, _TRIES = 0.7, 8
# Relative to the largest number compared: differences within it are rounding.
_ROUNDING = 1e-9


class ReleasedODEMerge(MergeMethod):
    r"""ODE-M as in the code its authors released, which is another algorithm than the paper's (Lin & Kang, 2026).

    The losses :math:`\ell_j` of all tasks, the incoming one included, are measured on their first 8 micro-batches. A
    step from t to t' = t + h with the transport :math:`u = (\theta_1-\theta)/(1-t)` is:

    1. Every task has a ceiling :math:`C_j(t) = (1-t)\,\ell_j(\theta_0) + t\,\ell_j(\theta_1) + B_{max}(1-t)^2`.
    2. The two tasks of largest :math:`\ell_j-C_j(t)` are constrained, and up to two of largest positive
       :math:`\langle g_j,u\rangle`, with the gradient :math:`g_j` on the task's first batch.
    3. Descent is added: :math:`w = u-\eta g_M`, :math:`g_M = \sum_j s_j G_j/\|G_j\|^p`, :math:`\eta = r\|u\|/\|g_M\|`
       with tasks' shares :math:`s_j` and sums :math:`G_j` of gradients.
    4. v is the velocity nearest to w with :math:`\langle g_j,v\rangle \le \min((C_j(t')-\ell_j)/h,\,0)` for the
       constrained tasks, see :func:`~lightning_odem.flow.constraints.project_`.
    5. :math:`\theta` moves by s h v with the first s of 1, 0.7, 0.49, ... (8 in all) after which no task is above
       :math:`C_j(t')`, or not at all. Time advances by h in any case.

    A step costs one gradient on each of these batches and one pass without gradient per try of s. Up to nine vectors
    of the model's size are held. See ``docs/methods.md``.

    Args:
        step_size: Step length h in (0, 1].
        budget: :math:`B_{max} \ge 0`, in units of the loss: slack of the ceilings at the start of a path.
        descent: :math:`r \ge 0`, length of the descent relative to the transport's; 0 omits it.
        norm_power: p in [0, 1]; 1 makes all tasks' gradients equally long, 0 leaves them as they are.
        refine: Whether each merge ends with :func:`~lightning_odem.methods.refinement.refine`, 80 small steps of AdamW
            on the buffer; the published runs end with it once.

    Raises:
        ValueError: For an argument outside its range.
    """

    needs = (Calibration(),)

    def __init__(
        self,
        step_size: float = 0.01,
        budget: float = 0.08,
        descent: float = 0.24,
        norm_power: float = 0.25,
        refine: bool = False,
    ) -> None:
        self.step_size = check_step("step_size", step_size)
        self.budget = check_range("budget", budget, 0)
        self.descent = check_range("descent", descent, 0, 100)
        self.norm_power = check_range("norm_power", norm_power, 0, 1)
        self.refine = check_flag("refine", refine)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Follow the path from ``merged`` towards ``incoming`` up to time ``t``, in the memory of ``merged``.

        Raises:
            NonFiniteLossError: If a loss of one of the models or a gradient on the path is not finite.
        """
        if t == 1.0:
            return MergeResult(merged.copy_(incoming))
        theta, probe = merged, TaskLosses(context[Calibration], _PROBE_BATCHES)
        losses, losses1 = probe(theta), probe(incoming)
        _check_finite(losses, "merged")
        _check_finite(losses1, "incoming")
        ceilings = partial(_ceilings, losses, losses1, self.budget)
        path = Trajectory(theta, loss1=probe.mean(losses1), t=[0.0], loss=[probe.mean(losses)])
        steps = math.ceil(t / self.step_size * (1.0 - 1e-12))
        if context.on_step is not None:
            context.on_step(0, steps)
        for step in range(steps):
            now = step * self.step_size
            later = t if step + 1 == steps else now + self.step_size
            velocity, gradients, alignment = self._descend(now, theta, incoming, probe, _excess(losses, ceilings(now)))
            if not math.isfinite(size := norm(velocity)):
                raise NonFiniteLossError(f"the velocity's norm, so a gradient or a weight, is {size}", step, now)
            allowed = ceilings(later)
            bounds = [min((allowed[task] - losses[task]) / (later - now), 0.0) for task in gradients]
            project_(velocity, list(gradients.values()), bounds)
            # Free vectors as soon as they are used, so that the next ones are not held beside them.
            del gradients
            move = velocity.mul_(later - now)
            scale, losses = _search_(theta, move, probe, losses, allowed)
            path.alignment.append(alignment)
            path.step_norm.append(scale * norm(move))
            del velocity, move
            path.t.append(later)
            path.loss.append(probe.mean(losses))
            if context.on_step is not None:
                context.on_step(step + 1, steps)
        if self.refine and steps:
            path.theta = refine(theta, context[Calibration])
            path.loss[-1] = probe.mean(probe(path.theta))
        path.gradient_evaluations = context[Calibration].gradient_evaluations
        return MergeResult(path.theta, path)

    def _descend(
        self, t: float, theta: Tensor, incoming: Tensor, probe: TaskLosses, excess: list[str]
    ) -> tuple[Tensor, dict[str, Tensor], float]:
        """Return the velocity w before its projection, the gradients of the constrained tasks and <g_M, u>."""
        field = TransportField()
        macro = torch.zeros_like(theta)
        gradients: dict[str, Tensor] = {}
        rises: dict[str, float] = {}
        sensitive: list[str] = []
        for task, (first, *others) in probe.batches.items():
            gradient = probe.gradient(theta, [first])
            rises[task] = field(t, theta, incoming, gradient, 0.0).alignment
            total = probe.gradient(theta, others).add_(gradient) if others else gradient
            macro.add_(total, alpha=probe.shares[task] / (norm(total) or 1.0) ** self.norm_power)
            gradients[task] = gradient
            if rises[task] > 0.0:
                admit(sensitive, task, rises, _SENSITIVE_TASKS, _ROUNDING * rises[task])
            gradients = {task: gradients[task] for task in gradients if task in {*excess, *sensitive}}
            # As in merge: do not hold them beside the next ones.
            del gradient, total
        transport = field(t, theta, incoming, macro, 0.0)
        length = norm(macro)
        eta = min(self.descent * transport.norm / length, _LARGEST_DESCENT) if length else 0.0
        macro.mul_(-eta)
        transport.add_to(macro, 1.0)
        return macro, gradients, transport.alignment


def _check_finite(losses: Mapping[str, float], model: str) -> None:
    for task, loss in losses.items():
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the {model} model's loss on task {task!r} is {loss}", 0, 0.0)


def _ceilings(losses0: Mapping[str, float], losses1: Mapping[str, float], budget: float, t: float) -> dict[str, float]:
    slack = budget * (1.0 - t) ** 2
    return {task: (1.0 - t) * losses0[task] + t * losses1[task] + slack for task in losses0}


def _excess(losses: Mapping[str, float], ceilings: Mapping[str, float]) -> list[str]:
    """The tasks furthest above their ceilings, or least below them."""
    above = {task: losses[task] - ceilings[task] for task in losses}
    return largest(above, _EXCESS_TASKS, _tolerance(losses, ceilings))


def _tolerance(losses: Mapping[str, float], ceilings: Mapping[str, float]) -> float:
    """How much rounding may change a loss or a ceiling."""
    return _ROUNDING * max(map(abs, (*losses.values(), *ceilings.values())))


def _search_(
    theta: Tensor, move: Tensor, probe: TaskLosses, losses: dict[str, float], ceilings: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """Move ``theta`` in place by the first share of ``move`` that every ceiling admits; return share and losses."""
    tolerance = _tolerance(losses, ceilings)
    for attempt in range(_TRIES):
        scale = _BACKTRACK**attempt
        candidate = torch.add(theta, move, alpha=scale)
        reached = probe(candidate)
        if all(reached[task] <= ceilings[task] + tolerance for task in reached):
            theta.copy_(candidate)
            return scale, reached
    return 0.0, losses

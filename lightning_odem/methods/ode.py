"""The rectified flow with descent, stopped at the operating time."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_odem.calibration import CalibrationObjective
from lightning_odem.flow import (
    SOLVERS,
    AdaptiveDescent,
    LowestPoint,
    RectifiedField,
    ReusedGradient,
    Solver,
    StepControl,
    integrate,
    scaled_time,
)
from lightning_odem.flow.blocks import alone
from lightning_odem.methods.arguments import check_choice, check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.became import became_time
from lightning_odem.methods.linalg import norm
from lightning_odem.methods.running_average import RunningAverage
from lightning_odem.methods.sampling import (
    CalibrationPart,
    Gradient,
    hold_out,
    minibatch_gradients,
    minibatches_per_epoch,
    samples_per_epoch,
)

GRANULARITIES = ("vector", "tensor", "row", "coordinate")
OPERATING_TIMES = ("utility", "search", "became")


class ODEMerge(MergeMethod):
    r"""ODE-M with descent: the paper's flow, which also uses its gradients to go down the loss.

    Algorithm 1 (Lin & Kang, 2026) rectifies one direction of the transport, that of the gradient, and only where the
    loss would rise more than the chord between the two models. On real streams that hardly ever happens, so it returns
    the running average, see :class:`~lightning_odem.methods.PaperODEMerge`. Here the same gradients, taken on random
    minibatches, are followed downhill as well,

    .. math:: \dot\theta = v_t(\theta) - a(t)\, D g, \qquad
        \int_0^{t_k} a\, dt = \kappa \rho\, \frac{N}{B} \sqrt{\frac{t_k}{h}}, \quad
        \rho = \frac{\lVert\theta_1 - \theta_0\rVert}{\sqrt d},

    with :math:`v_t` the rectified transport, :math:`D g` Adam's normalised gradient, N samples in the buffer and B in a
    minibatch; a(t) falls linearly to zero, see :class:`~lightning_odem.flow.AdaptiveDescent`. The unit of the descent's
    length, :math:`\rho`, is the distance of the two models, root mean square per weight, so that there is no learning
    rate to be fitted to a model. More samples determine a descent better and make it longer; epochs over the same
    samples, t / h of them, only as their root. It vanishes as t goes to 0, and at t = 1 the path ends in the incoming
    model.

    The path begins at the merged model :math:`\Psi`, so that the descents of all merges add up, as in the paper's
    recursion. With ``carry`` c below 1 it begins at :math:`\theta_0 = \bar\theta + c\,(\Psi - \bar\theta)`, nearer to
    the running average :math:`\bar\theta` of the models so far, which is then kept beside the merged model: what a
    descent has found for the samples of k tasks is not built upon, but found anew for k + 1. c = 0 and kappa =
    0.012 had a lower loss on validation splits and, on test splits, the same accuracy within noise (README, "What the
    calibration gradients buy"); so the default is what needs less memory. :math:`\kappa` = 0.006 follows from runs with
    descents of several lengths and 128 to 1024 samples, on validation splits of small images.

    A merge costs as many sample gradients as Algorithm 1's, ceil(t / h) N, and three passes over the buffer without
    gradient. Besides the incoming model it holds the point, a gradient and Adam's two moments, and two of Adam's
    temporaries within a step; with ``carry`` below 1 the running average is in main memory from merge to merge, in the
    method and in the stream's state. The loss at t = 0 in the report is that of :math:`\theta_0`.

    A task of weight 0 leaves the merged model as it is. Batch-norm statistics stand at those of the utility time while
    the path is followed, and are afterwards those of the time that was reached.

    Args:
        step_size: Step length h in (0, 1]; 0.05 is the paper's.
        solver: ``"euler"`` (the paper's) or ``"heun"`` (order 2, two gradients per step).
        granularity: Blocks in which the transport is rectified, see :class:`~lightning_odem.flow.RectifiedField`.
            ``"vector"`` (the paper's): all parameters together; ``"tensor"``: each by itself; ``"row"``: each entry of
            the first dimension of those with two or more, which in a weight matrix or a convolution is an output, and
            the others whole; ``"coordinate"``: every weight. Theorem 3.4 holds for all; finer blocks take more out of
            the transport. None needs further gradients or a further vector of the model's size.
        operating_time: How far the flow goes. ``"utility"`` (the paper's): to :math:`t_k = w_k / \sum_j w_j`. A number
            in [0, 1]: to that time in every merge. ``"became"``: to the minimum of a quadratic model of all tasks'
            losses, see :func:`~lightning_odem.methods.became.became_time`; one more gradient on every sample.
            ``"search"``: to the point of lowest loss on calibration samples that the gradients do not see, among those
            h apart between the times that :math:`t_k` would be if the task's weight were ``search_to`` times smaller
            and larger. One more vector of the model's size is held. The report has the losses of all candidates.
        search_to: Factor c >= 1 of the search. Weights keep their meaning: the odds :math:`t / (1 - t)` of old and new
            are changed by c at most, a task of weight 0 has time 0 and one that alone has a weight time 1. With 2 the
            path goes to :math:`2t / (1 + t)`, short of twice as far and of 1; two equal tasks are searched from
            1/3 to 2/3. The cost grows by that, and by one pass over the held-out samples per candidate.
        holdout: Share of each task's samples that the search holds out, in (0, 1).
        batch_size: A number: every gradient is one on a random minibatch of so many samples, which also bounds the
            memory of a pass. N samples make ceil(N / B) steps of equal length per h, so that as many samples are
            differentiated as by whole-buffer gradients: ceil(t / h) epochs. The loss budget is that of the whole
            buffer, for one more pass; losses on the way are the minibatches'. None (the paper's): every gradient is one
            on the whole buffer.
        descent: Length of the descent :math:`\kappa`, >= 0; 0 is the paper's flow.
        carry: Share c in [0, 1] of the last merge's correction that the next path begins with; 1 is the paper's.
        reuse: Steps per gradient; with 4 a merge costs a fourth, see :class:`~lightning_odem.flow.ReusedGradient`.
        step_control: Whether the loss decides on the length of the steps, see
            :class:`~lightning_odem.flow.StepControl`; h is that of the first. One more pass without gradient per try,
            on the whole buffer also with minibatches, and one more vector of the model's size. The report has the
            steps that were taken back. Only without descent: a step that is taken back has moved Adam's moments.
        seed: Seed of the minibatches; each merge begins with it.

    Raises:
        ValueError: For a step size outside (0, 1], an unknown solver, granularity or operating time, a number
            outside its range, or step control together with descent; when merging, if the calibration buffer has too
            few samples for the operating time.
    """

    needs: frozenset[str] = frozenset({"calibration"})
    sharded = True

    def __init__(
        self,
        step_size: float = 0.05,
        solver: str = "euler",
        granularity: str = "vector",
        operating_time: float | str = "utility",
        search_to: float = 2.0,
        holdout: float = 0.25,
        batch_size: int | None = 64,
        descent: float = 0.006,
        carry: float = 1.0,
        reuse: int = 1,
        step_control: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0.0 < step_size <= 1.0:
            raise ValueError(f"The step size must lie in (0, 1], got step_size={step_size}.")
        if solver not in SOLVERS:
            raise ValueError(f"Unknown solver {solver!r}; the solvers are {', '.join(sorted(SOLVERS))}.")
        check_choice("granularity", granularity, GRANULARITIES)
        if isinstance(operating_time, str):
            check_choice("operating_time, unless a number,", operating_time, OPERATING_TIMES)
        else:
            check_range("operating_time", operating_time, 0, 1)
        check_range("search_to", search_to, 1)
        if not 0.0 < holdout < 1.0:
            raise ValueError(f"holdout must lie in (0, 1), got holdout={holdout}.")
        if batch_size is not None:
            check_range("batch_size", batch_size, 1)
        check_range("descent", descent, 0)
        check_range("carry", carry, 0, 1)
        check_range("reuse", reuse, 1)
        if step_control and descent:
            raise ValueError(f"step_control takes steps back, which a descent cannot ({descent=}); set descent=0.")
        self.step_size = step_size
        self.solver = solver
        self.granularity = granularity
        self.operating_time = operating_time
        self.search_to = search_to
        self.holdout = holdout
        self.batch_size = batch_size
        self.descent = descent
        self.carry = carry
        self.reuse = reuse
        self.step_control = step_control
        self.seed = seed
        self._average = RunningAverage()

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The first task's model as it is."""
        self._average.load_state_dict({})
        if self.carry < 1.0:
            self._average.start(incoming, context)
        return MergeResult(incoming)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Integrate from ``merged`` towards ``incoming`` up to the operating time, in the memory of ``merged``."""
        assert context.calibration is not None, "declared in needs"
        objective: CalibrationObjective | CalibrationPart = context.calibration
        from_average = self.carry < 1.0 and t > 0.0
        if from_average:
            self._average.draw_(merged, 1.0 - self.carry, context)
        end, lowest = self._end(merged, incoming, t, context), None
        if self.operating_time == "search":
            objective, held_out = hold_out(context.calibration, self.holdout)
            lowest = LowestPoint(held_out.loss, scaled_time(t, 1 / self.search_to), end, self.step_size)
        gradient: Gradient = objective.loss_and_grad
        step_size = self.step_size
        if self.batch_size is not None:
            gradient = minibatch_gradients(context.calibration, objective.buffer, self.batch_size, self.seed)
            epochs = math.ceil(end / step_size * (1.0 - 1e-12))
            step_size = end / max(epochs, 1) / minibatches_per_epoch(objective.buffer, self.batch_size) or step_size
        rule = self._rule(merged, incoming, end, objective, context)
        trajectory = integrate(
            merged,
            incoming,
            gradient,
            end,
            step_size=min(self.reuse * step_size, 1.0),
            field=_field(context, self.granularity, merged.device),
            solver=rule,
            loss=objective.loss,
            out=merged,
            on_step=context.on_step,
            control=StepControl() if self.step_control else None,
            estimated=self.batch_size is not None,
            observe=lowest,
        )
        if lowest is not None:
            lowest.write_(trajectory.theta)
            trajectory.cut(end := lowest.best_t)
            if trajectory.estimated:
                trajectory.loss[-1] = objective.loss(trajectory.theta)  # that of the whole buffer, as at any end
            trajectory.held_out_t, trajectory.held_out_loss = lowest.t, lowest.loss
        if from_average:
            self._average.move(incoming, end, context)
        return MergeResult(trajectory.theta, trajectory, t=None if self.operating_time == "utility" else end)

    def state_dict(self) -> dict[str, Any]:
        """The running average, where a path does not begin at the merged model; empty before the first task."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an empty one begins a new stream, or takes over that of another method.

        Raises:
            ValueError: If another method wrote it.
        """
        if state and state.keys() != {"average"}:
            raise ValueError(f"ODEMerge keeps an average, but the stream's state has: {', '.join(state)}.")
        self._average.load_state_dict(state)

    def _rule(
        self,
        merged: Tensor,
        incoming: Tensor,
        end: float,
        objective: CalibrationObjective | CalibrationPart,
        context: MergeContext,
    ) -> Solver:
        """One step of the path."""
        rule: Solver = SOLVERS[self.solver]()
        if self.reuse > 1:
            rule = ReusedGradient(rule, self.reuse)
        if self.descent and end:
            samples = samples_per_epoch(objective.buffer)
            size = len(merged) if context.shards is None else sum(map(math.prod, context.shapes))
            moved = norm(incoming - merged, context.sum_) / max(size, 1) ** 0.5
            minibatches = samples / (self.batch_size or samples)
            length = self.descent * moved * minibatches * (end / self.step_size) ** 0.5
            rule = AdaptiveDescent(rule, length, end)
        return rule

    def _end(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> float:
        """Time to which the path is followed."""
        if self.operating_time == "became":
            assert context.calibration is not None, "declared in needs"
            return became_time(context.calibration, merged, incoming, t, context.sum_)
        if self.operating_time == "search":
            return scaled_time(t, self.search_to)
        # A task without weight changes nothing.
        return t if self.operating_time == "utility" or t == 0.0 else float(self.operating_time)


def _field(context: MergeContext, granularity: str, device: torch.device) -> RectifiedField:
    """The field whose blocks are the vector, the entries, or the parameters or their rows."""
    sum_ = context.sum_ or alone
    if granularity not in ("tensor", "row"):
        return RectifiedField(granularity, sum_)
    shards = context.shards
    lengths, split = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.bool)]
    for shape, part in zip(context.shapes, context.local_shapes, strict=True):
        size, by_row = math.prod(part), granularity == "row" and len(shape) > 1
        # Parameters are cut between rows: a row lies in one shard, what is no matrix in all of them.
        if size or (shards is not None and not by_row):
            rows = part[0] if by_row else 1
            lengths.append(torch.full((rows,), size // rows))
            split.append(torch.full((rows,), not by_row))
    return RectifiedField(torch.cat(lengths).to(device), sum_, torch.cat(split) if shards is not None else None)

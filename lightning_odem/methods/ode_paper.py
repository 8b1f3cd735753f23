"""ODE-M as the paper prints it, and other times, blocks and gradients for its flow."""

import math
from typing import Any

from torch import Tensor

from lightning_odem.calibration import CalibrationObjective
from lightning_odem.flow import SOLVERS, LowestPoint, ReusedGradient, Solver, StepControl, integrate, scaled_time
from lightning_odem.methods.arguments import check_choice, check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.became import became_time
from lightning_odem.methods.granularity import GRANULARITIES, rectified_field
from lightning_odem.methods.needs import Calibration
from lightning_odem.methods.sampling import Gradient, hold_out, minibatch_gradients, minibatches_per_epoch

OPERATING_TIMES = ("utility", "search", "became")
ODE_STATE = {"mean", "sums", "concentration", "scale"}
"""Keys of the state of :class:`~lightning_odem.ODEMerge`."""
EARLIER_ODE_STATE = {"average", "departure_a", "departure_b", "gradient", "samples"}
"""Keys that its state had in version 0.4 and before, the first one always."""


class PaperODEMerge(MergeMethod):
    r"""Algorithm 1 of the paper (Lin & Kang, 2026), with a shortened last step.

    The flow carries the last merged model towards the incoming one, :math:`\dot\theta = v_t(\theta)`, and stops at the
    operating time :math:`t_k`. The field :math:`v_t` is the transport :math:`(\theta_1 - \theta) / (1 - t)`. Its part
    along the calibration loss's gradient is damped where the loss would rise above the chord between the two models,
    see :class:`~lightning_odem.flow.RectifiedField`. At t = 1 the path ends in the incoming model. With equal weights
    and no damping anywhere the merged model is the running average.

    One merge costs ceil(t / h) gradients on the whole calibration buffer and two passes without gradient. It holds one
    gradient besides the two models. No state is kept from merge to merge.

    The defaults are the paper's. None of the other choices is in the paper: blocks of the rectification, another
    operating time, gradients on minibatches, gradients that serve several steps, and steps as long as the loss allows.

    A task of weight 0 leaves the merged model as it is. On the path, batch-norm statistics are those of the utility
    time; afterwards they are those of the time that was reached.

    Args:
        step_size: Step length h in (0, 1]; 0.05 is the paper's.
        solver: ``"euler"`` (the paper's) or ``"heun"`` (order 2, two gradients per step).
        granularity: Blocks in which the transport is rectified, see :class:`~lightning_odem.flow.RectifiedField`.
            ``"vector"`` (the paper's): all parameters together. ``"tensor"``: each parameter by itself. ``"row"``: each
            entry along the first dimension of parameters with two or more dimensions, which is an output of a weight
            matrix or a convolution; other parameters whole. ``"coordinate"``: every weight. Theorem 3.4 holds for all.
            Finer blocks take more out of the transport. No choice needs further gradients or a further vector of the
            model's size.
        operating_time: How far the flow goes. ``"utility"`` (the paper's): to :math:`t_k = w_k / \sum_j w_j`. A number
            in [0, 1]: to that time in every merge. ``"became"``: to the minimum of a quadratic model of all tasks'
            losses, see :func:`~lightning_odem.methods.became.became_time`; this takes one more gradient on every
            sample. ``"search"``: to the point of lowest loss on calibration samples that the gradients do not see. The
            candidates are h apart. They lie between the times that :math:`t_k` would be if the task's weight were
            ``search_to`` times smaller and larger. The search holds one more vector of the model's size. The report has
            the losses of all candidates.
        search_to: Factor c >= 1 of the search. Weights keep their meaning: the odds :math:`t / (1 - t)` of old and new
            change by c at most. A task of weight 0 has time 0; a task that alone has a weight has time 1. With 2 the
            path goes to :math:`2t / (1 + t)`, which is less than twice as far and less than 1; for two equal tasks the
            search goes from 1/3 to 2/3. The cost grows with the length of the path, and by one pass over the held-out
            samples per candidate.
        holdout: Share of each task's samples that the search holds out, in (0, 1).
        batch_size: None (the paper's): every gradient is taken on the whole buffer. A number: every gradient is taken
            on a random minibatch of that many samples, which also bounds the memory of a pass. N samples then make
            ceil(N / B) steps of equal length per h, so as many samples are differentiated as by whole-buffer gradients:
            ceil(t / h) epochs. The loss budget is that of the whole buffer, for one more pass. Losses on the way are
            those of the minibatches.
        reuse: Steps per gradient; with 4 a merge costs a quarter, see :class:`~lightning_odem.flow.ReusedGradient`.
        step_control: Whether the loss decides on the length of the steps, see
            :class:`~lightning_odem.flow.StepControl`; h is the length of the first step. Each try costs one more pass
            without gradient, on the whole buffer even with minibatches. One more vector of the model's size is held.
            The report has the steps that were taken back.
        seed: Seed of the minibatches; each merge starts from it.

    Raises:
        ValueError: For a step size outside (0, 1], an unknown solver, granularity or operating time, or a number
            outside its range; when merging, if the calibration buffer has too few samples for the operating time.
    """

    needs = (Calibration(),)
    sharded = True

    def __init__(
        self,
        step_size: float = 0.05,
        solver: str = "euler",
        granularity: str = "vector",
        operating_time: float | str = "utility",
        search_to: float = 2.0,
        holdout: float = 0.25,
        batch_size: int | None = None,
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
        check_range("reuse", reuse, 1)
        self.step_size = step_size
        self.solver = solver
        self.granularity = granularity
        self.operating_time = operating_time
        self.search_to = search_to
        self.holdout = holdout
        self.batch_size = batch_size
        self.reuse = reuse
        self.step_control = step_control
        self.seed = seed

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Integrate towards ``incoming`` up to the operating time, in the memory of ``merged``."""
        objective, unseen = context[Calibration], None
        if self.operating_time == "search":
            objective, unseen = hold_out(objective, self.holdout)
            context = context.having(Calibration, objective)
        end, lowest = self._end(merged, incoming, t, objective, context), None
        if unseen is not None:
            lowest = LowestPoint(unseen.loss, scaled_time(t, 1 / self.search_to), end, self.step_size)
        gradient: Gradient = objective.loss_and_grad
        epoch = end / max(math.ceil(end / self.step_size * (1.0 - 1e-12)), 1)
        step_size = max(self.step_size, epoch)  # so that the last step of Algorithm 1 is the shorter one
        if self.batch_size is not None:
            gradient = minibatch_gradients(objective, objective.buffer, self.batch_size, self.seed)
            step_size = epoch / minibatches_per_epoch(objective.buffer, self.batch_size)
        trajectory = integrate(
            merged,
            incoming,
            gradient,
            end,
            step_size=min(self.reuse * step_size, 1.0) or self.step_size,
            field=rectified_field(context, self.granularity, merged.device),
            solver=self._rule(),
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
                trajectory.loss[-1] = objective.loss(trajectory.theta)  # the loss of all samples, as at any end
            trajectory.held_out_t, trajectory.held_out_loss = lowest.t, lowest.loss
        return MergeResult(trajectory.theta, trajectory, t=None if self.operating_time == "utility" else end)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep nothing. A state that :class:`~lightning_odem.ODEMerge` of this or an earlier version wrote is dropped.

        So a stream of that method can continue with this one. The sums of that method would be out of date after a
        merge.

        Raises:
            ValueError: If another method wrote the state.
        """
        super().load_state_dict({} if state.keys() == ODE_STATE or is_earlier_ode_state(state) else state)

    def _rule(self) -> Solver:
        """One step of the path."""
        rule: Solver = SOLVERS[self.solver]()
        return ReusedGradient(rule, self.reuse) if self.reuse > 1 else rule

    def _end(
        self, start: Tensor, incoming: Tensor, t: float, objective: CalibrationObjective, context: MergeContext
    ) -> float:
        """Time to which the path is followed."""
        if self.operating_time == "became":
            return became_time(objective, start, incoming, t, context.sum_)
        if self.operating_time == "search":
            return scaled_time(t, self.search_to)
        # A task without weight changes nothing.
        return t if self.operating_time == "utility" or t == 0.0 else float(self.operating_time)


def is_earlier_ode_state(state: dict[str, Any]) -> bool:
    """Whether a state was written by the ODEMerge of version 0.4 or before."""
    return "average" in state and state.keys() <= EARLIER_ODE_STATE

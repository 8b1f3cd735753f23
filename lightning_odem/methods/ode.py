"""The rectified flow with descent, stopped at the operating time."""

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_odem.calibration import CalibrationObjective
from lightning_odem.flow import (
    SOLVERS,
    AdaptiveDescent,
    LowestPoint,
    ReusedGradient,
    Solver,
    StepControl,
    integrate,
    scaled_time,
)
from lightning_odem.methods.arguments import check_choice, check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.became import became_time
from lightning_odem.methods.cross_fit import STATE, CrossFit
from lightning_odem.methods.granularity import GRANULARITIES, rectified_field
from lightning_odem.methods.linalg import norm
from lightning_odem.methods.sampling import (
    Gradient,
    corrected,
    hold_out,
    minibatch_gradients,
    minibatches_per_epoch,
    samples_per_epoch,
)

OPERATING_TIMES = ("utility", "search", "became")


class ODEMerge(MergeMethod):
    r"""ODE-M with descent: the paper's flow, which also uses its gradients to go down the loss.

    Algorithm 1 (Lin & Kang, 2026) rectifies one direction of the transport, that of the gradient, and only where the
    loss would rise more than the chord between the two models. On real streams that hardly ever happens, so it returns
    the running average, see :class:`~lightning_odem.methods.PaperODEMerge`. Here the same gradients, taken on random
    minibatches, are followed downhill as well,

    .. math:: \dot\theta = v_t(\theta) - a(t)\, D g, \qquad
        \int_0^{t_k} a\, dt = \kappa \rho\, \frac{N}{B} \sqrt{E}, \quad E = \min(\lceil t_k / h\rceil, 2), \quad
        \rho = \frac{\lVert\theta_1 - \bar\theta_{k-1}\rVert}{\sqrt d},

    with :math:`v_t` the rectified transport, :math:`D g` Adam's normalised gradient, N samples in the buffer, B in a
    minibatch and E passes over them; a(t) falls linearly to zero, see :class:`~lightning_odem.flow.AdaptiveDescent`.
    The unit of the descent's length, :math:`\rho`, is the distance of the two models, root mean square per weight, so
    that there is no learning rate to be fitted to a model. More samples determine a descent better and make it longer;
    epochs over the same samples only as their root. At t = 1 the path ends in the incoming model.

    **It knows more than the buffer holds.** What limits such a descent is the sampling error of its few gradients.
    So when a task arrives, its gradient at the base model is taken once on up to ``task_samples`` of its samples, not
    only on those that the buffer has a place for, and the mean of these gradients over all tasks is kept: one vector,
    no samples. Every gradient is corrected by what the buffer's samples lack of it at the base model, see
    :class:`~lightning_odem.methods.control_variate.ControlVariate`. Where there is no base model, or the samples of a
    task cannot be drawn by index, it is not.

    **It falls back to the running average by itself.** Two paths are followed, with the gradients of one half of the
    samples each, and each is judged by the loss on the other half, see
    :class:`~lightning_odem.methods.cross_fit.CrossFit`. The merged model is the running average
    :math:`\bar\theta_k` of the models so far, which has seen no sample, plus as much of the paths' mean departure from
    it as lowers the loss on samples that they did not see. A sample stays in its half for good, so the next merge's
    paths go on from where these ended and still know nothing of the other half. So a :math:`\kappa` that is too large
    is no harm; 0.018 follows from runs with descents of several lengths and 128 to 1024 samples, on validation splits
    of small images.

    With M samples of the new task a merge costs (E + 1) N + M + 256 sample gradients, the first task M; Algorithm 1's
    costs ceil(t / h) N. (With 8 equal tasks of 1600 samples and N = 1024 all merges but the first cost 34,500 and
    36,900.)
    There are seven passes over the buffer without gradient: three for the ends of the paths, three and one to judge
    them and to measure the result. Besides the incoming model it holds the end of the first path, the point, a
    gradient, its correction and Adam's two moments, and two of Adam's temporaries within a step; in main memory from
    merge to merge the running average, both departures and the mean gradient, and while it merges the next of each. The
    loss at t = 0 in the report is the mean over the halves of that where its path begins, and steps are those of the
    first path.

    With ``descent=0`` one path goes on from the last merged model :math:`\Psi_{k-1}` as in the paper, with all samples,
    and nothing is kept from merge to merge.

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
            losses, see :func:`~lightning_odem.methods.became.became_time`; one more gradient on every sample. With a
            descent, and in a search, each half has a time of its own and the merge their mean.
            ``"search"``: to the point of lowest loss on calibration samples that the gradients do not see, among those
            h apart between the times that :math:`t_k` would be if the task's weight were ``search_to`` times smaller
            and larger. One more vector of the model's size is held. The report has the losses of all candidates.
        search_to: Factor c >= 1 of the search. Weights keep their meaning: the odds :math:`t / (1 - t)` of old and new
            are changed by c at most, a task of weight 0 has time 0 and one that alone has a weight time 1. With 2 the
            path goes to :math:`2t / (1 + t)`, short of twice as far and of 1; two equal tasks are searched from
            1/3 to 2/3. The cost grows by that, and by one pass over the held-out samples per candidate.
        holdout: Share of each task's samples that the search holds out, in (0, 1). With a descent it is always one
            half: a path looks for its end on the samples that it is judged by.
        batch_size: A number: every gradient is one on a random minibatch of so many samples, which also bounds the
            memory of a pass. N samples make ceil(N / B) steps of equal length per h, so that as many samples are
            differentiated as by whole-buffer gradients: ceil(t / h) epochs, with a descent ``epochs`` at most. The loss
            budget is that of the whole buffer, for one more pass; losses on the way are the minibatches'. None (the
            paper's): every gradient is one on the whole buffer.
        descent: Length of the descent :math:`\kappa`, >= 0; 0 is the paper's flow.
        epochs: With a descent, passes over the samples at most, so that their number is not that of the paper's
            early merges, which have few tasks to reconcile.
        task_samples: With a descent, samples M of a task, those in the buffer among them, on which its gradient at the
            base model is taken when it comes; 0: no such gradient. It has to be many times N / k, what the buffer keeps
            of a task: in the eighth of eight merges 1600 with N between 128 and 1024 gave 0.6 to 1.6 points on
            validation splits, N itself none.
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
        descent: float = 0.018,
        epochs: int = 2,
        task_samples: int = 2048,
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
        check_range("epochs", epochs, 1)
        check_range("task_samples", task_samples, 0)
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
        self.epochs = epochs
        self.task_samples = task_samples if descent else 0
        self.reuse = reuse
        self.step_control = step_control
        self.seed = seed
        self._cross_fit = CrossFit()

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The first task's model as it is; its gradient at the base model is kept."""
        self._cross_fit.load_state_dict({})
        if self.descent:
            self._cross_fit.start(incoming, context)
        return MergeResult(incoming)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Integrate towards ``incoming`` up to the operating time, in the memory of ``merged``."""
        assert context.calibration is not None, "declared in needs"
        if self.descent and t > 0.0:
            return self._cross_fit.merge(self._follow, merged, incoming, t, context)
        if self.operating_time != "search":
            return self._follow(merged, incoming, t, context)
        seen, unseen = hold_out(context.calibration, self.holdout)
        return self._follow(merged, incoming, t, replace(context, calibration=seen), unseen)

    def state_dict(self) -> dict[str, Any]:
        """With a descent the running average and the tasks' mean gradient; empty before the first task."""
        return self._cross_fit.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an empty one begins a new stream, or takes over that of another method.

        Without a descent it is dropped: merges from now on would leave it behind.

        Raises:
            ValueError: If another method wrote it.
        """
        if state and not {"average"} <= state.keys() <= STATE:
            raise ValueError(f"ODEMerge keeps an average, but the stream's state has: {', '.join(state)}.")
        self._cross_fit.load_state_dict(state if self.descent else {})

    def _follow(
        self,
        start: Tensor,
        incoming: Tensor,
        t: float,
        context: MergeContext,
        unseen: CalibrationObjective | None = None,
        correction: Tensor | None = None,
    ) -> MergeResult:
        """One path with the samples of ``context``, in the memory of ``start``.

        ``unseen`` are the samples of a search, ``correction`` what is added to each gradient.
        """
        objective = context.calibration
        assert objective is not None, "declared in needs"
        end, lowest = self._end(start, incoming, t, objective, context), None
        if self.operating_time == "search":
            assert unseen is not None, "a search has samples held out"
            lowest = LowestPoint(unseen.loss, scaled_time(t, 1 / self.search_to), end, self.step_size)
        gradient: Gradient = objective.loss_and_grad
        epoch = end / max(self._epochs(end), 1)
        step_size = max(self.step_size, epoch)  # so that the last step of Algorithm 1 is the shorter one
        if self.batch_size is not None:
            gradient = minibatch_gradients(objective, objective.buffer, self.batch_size, self.seed)
            step_size = epoch / minibatches_per_epoch(objective.buffer, self.batch_size)
        trajectory = integrate(
            start,
            incoming,
            corrected(gradient, correction),
            end,
            step_size=min(self.reuse * step_size, 1.0) or self.step_size,
            field=rectified_field(context, self.granularity, start.device),
            solver=self._rule(start, incoming, end, objective, context),
            loss=objective.loss,
            out=start,
            on_step=context.on_step,
            control=StepControl() if self.step_control else None,
            estimated=self.batch_size is not None,
            observe=lowest,
        )
        if lowest is not None:
            lowest.write_(trajectory.theta)
            trajectory.cut(end := lowest.best_t)
            if trajectory.estimated:
                trajectory.loss[-1] = objective.loss(trajectory.theta)  # that of all samples, as at any end
            trajectory.held_out_t, trajectory.held_out_loss = lowest.t, lowest.loss
        return MergeResult(trajectory.theta, trajectory, t=None if self.operating_time == "utility" else end)

    def _epochs(self, end: float) -> int:
        """Passes over the samples: as many as Algorithm 1 takes to the time, with a descent ``epochs`` at most."""
        passes = math.ceil(end / self.step_size * (1.0 - 1e-12))
        return min(passes, self.epochs) if self.descent else passes

    def _rule(
        self, start: Tensor, incoming: Tensor, end: float, objective: CalibrationObjective, context: MergeContext
    ) -> Solver:
        """One step of the path."""
        rule: Solver = SOLVERS[self.solver]()
        if self.reuse > 1:
            rule = ReusedGradient(rule, self.reuse)
        if self.descent and end:
            samples = samples_per_epoch(objective.buffer)
            size = len(start) if context.shards is None else sum(map(math.prod, context.shapes))
            distance = norm(incoming - start, context.sum_) / max(size, 1) ** 0.5
            minibatches = 2 * samples / (self.batch_size or 2 * samples)  # of both halves
            rule = AdaptiveDescent(rule, self.descent * distance * minibatches * self._epochs(end) ** 0.5, end)
        return rule

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

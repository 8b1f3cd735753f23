"""ODE-M as the paper prints it, with other times, blocks and gradients for its flow."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_odem.arguments import check_choice, check_instance, check_step
from lightning_odem.calibration import CalibrationObjective
from lightning_odem.flow import (
    RectifiedField,
    ReusedGradient,
    Solver,
    StepControl,
    Trajectory,
    integrate,
    resolve_solver,
)
from lightning_odem.flow.blocks import alone
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.needs import Calibration
from lightning_odem.methods.operating_times import OperatingTime, Path, resolve_operating_time
from lightning_odem.methods.sampling import Gradient, Minibatches

ODE_STATE = {"mean", "sums", "concentration", "scale"}
"""Keys of the state of :class:`~lightning_odem.ODEMerge`."""
EARLIER_ODE_STATE = {"average", "departure_a", "departure_b", "gradient", "samples"}
"""Keys that its state had in version 0.4 and before, the first one always."""
GRANULARITIES = ("vector", "tensor", "row", "coordinate")


class PaperODEMerge(MergeMethod):
    r"""Algorithm 1 of the paper (Lin & Kang, 2026), with a shortened last step.

    The flow carries the last merged model towards the incoming one, :math:`\dot\theta = v_t(\theta)`, and stops at the
    operating time :math:`t_k`. The field :math:`v_t` is the transport :math:`(\theta_1 - \theta) / (1 - t)`. Its part
    along the calibration loss's gradient is damped where the loss would rise above the chord between the two models,
    see :class:`~lightning_odem.flow.RectifiedField`. With equal weights and no damping the merged model is the running
    average.

    One merge costs ceil(t / h) gradients on the whole calibration buffer and two passes without gradient. It holds one
    gradient besides the two models. No state is kept from merge to merge. The defaults are the paper's.

    Args:
        step_size: Step length h in (0, 1]; 0.05 is the paper's.
        solver: ``"euler"`` (the paper's), ``"heun"`` (order 2, two gradients per step), or a solver such as
            :class:`~lightning_odem.flow.ReusedGradient`, which takes several steps with one gradient.
        granularity: Blocks in which the transport is rectified: ``"vector"`` (the paper's), ``"tensor"``, ``"row"`` of
            a weight matrix or a convolution, or ``"coordinate"``. Finer blocks take more out of the transport.
        operating_time: Where the flow stops: ``"utility"`` (the paper's), a number in [0, 1], ``"became"``,
            ``"search"``, or a rule such as ``SearchedTime(factor=3.0)``, see
            :class:`~lightning_odem.methods.OperatingTime`.
        minibatches: None (the paper's): each gradient is taken on the whole buffer. Otherwise random minibatches of the
            same cost, see :class:`~lightning_odem.methods.Minibatches`.
        step_control: Lets the loss decide on the lengths of the steps after the first, see
            :class:`~lightning_odem.flow.StepControl`.

    Raises:
        ValueError: For a step size outside (0, 1], or an unknown solver, granularity or operating time.

    Example:
        >>> from lightning_odem.methods import SearchedTime
        >>> method = PaperODEMerge(solver="heun", operating_time=SearchedTime(factor=3.0))
    """

    needs = (Calibration(),)
    sharded = True

    def __init__(
        self,
        step_size: float = 0.05,
        solver: str | Solver = "euler",
        granularity: str = "vector",
        operating_time: str | float | OperatingTime = "utility",
        minibatches: Minibatches | None = None,
        step_control: StepControl | None = None,
    ) -> None:
        check_step("step_size", step_size)
        check_choice("granularity", granularity, GRANULARITIES)
        self.step_size = step_size
        resolve_solver(solver), resolve_operating_time(operating_time)
        if minibatches is not None:
            check_instance("minibatches", minibatches, Minibatches, "Minibatches(size), or None,")
        if step_control is not None:
            check_instance("step_control", step_control, StepControl, "StepControl(), or None,")
        self.solver = solver
        self.granularity = granularity
        self.operating_time = operating_time
        self.minibatches = minibatches
        self.step_control = step_control

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Integrate towards ``incoming`` up to the operating time, in the memory of ``merged``."""
        field = rectified_field(context, self.granularity, merged.device)

        def follow(
            end: float, objective: CalibrationObjective, observe: Callable[[float, Tensor], None] | None
        ) -> Trajectory:
            gradient: Gradient = objective.differentiate
            epoch = end / max(math.ceil(end / self.step_size * (1.0 - 1e-12)), 1)
            step_size = max(self.step_size, epoch)  # so that the last step of Algorithm 1 is the shorter one
            if self.minibatches is not None:
                gradient = self.minibatches.deferred(objective)
                step_size = epoch / self.minibatches.per_epoch(objective.buffer)
            return integrate(
                merged,
                incoming,
                gradient,
                end,
                step_size=min(self._steps_per_gradient * step_size, 1.0) or self.step_size,
                field=field,
                solver=self.solver,
                loss=objective.loss,
                out=merged,
                on_step=context.on_step,
                control=self.step_control,
                estimated=self.minibatches is not None,
                observe=observe,
            )

        path = Path(merged, incoming, t, context[Calibration], self.step_size, follow, context.sum_)
        trajectory = resolve_operating_time(self.operating_time).follow(path)
        return MergeResult(trajectory.theta, trajectory, t=trajectory.t[-1])

    @property
    def _steps_per_gradient(self) -> int:
        return self.solver.times if isinstance(self.solver, ReusedGradient) else 1

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep nothing. A state that :class:`~lightning_odem.ODEMerge` of this or an earlier version wrote is dropped.

        So a stream of that method can continue with this one. The sums of that method would be out of date after a
        merge.

        Raises:
            ValueError: If another method wrote the state.
        """
        super().load_state_dict({} if state.keys() == ODE_STATE or is_earlier_ode_state(state) else state)


def is_earlier_ode_state(state: dict[str, Any]) -> bool:
    """Whether a state was written by the ODEMerge of version 0.4 or before."""
    return "average" in state and state.keys() <= EARLIER_ODE_STATE


def rectified_field(context: MergeContext, granularity: str, device: torch.device) -> RectifiedField:
    """The field whose blocks are the vector, the entries, or the parameters or their rows.

    Args:
        context: The parameters' shapes, and how processes share them.
        granularity: One of :data:`GRANULARITIES`, see :class:`~lightning_odem.PaperODEMerge`.
        device: Where the vectors are.
    """
    sum_ = context.sum_ or alone
    if granularity not in ("tensor", "row"):
        return RectifiedField(granularity, sum_)
    shards = context.shards
    lengths, split = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.bool)]
    for shape, part in zip(context.shapes, context.local_shapes, strict=True):
        size, by_row = math.prod(part), granularity == "row" and len(shape) > 1
        # Shards are cut between rows: a row lies in one shard, a parameter without rows may lie in all of them.
        if size or (shards is not None and not by_row):
            rows = part[0] if by_row else 1
            lengths.append(torch.full((rows,), size // rows))
            split.append(torch.full((rows,), not by_row))
    return RectifiedField(torch.cat(lengths).to(device), sum_, torch.cat(split) if shards is not None else None)

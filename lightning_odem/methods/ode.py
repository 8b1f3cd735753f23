"""ODE-M: the rectified flow stopped at the operating time (Algorithm 1 of the paper)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_odem.flow import SOLVERS, RectifiedField, integrate
from lightning_odem.methods.arguments import check_choice
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult

GRANULARITIES = ("vector", "tensor", "row", "coordinate")


class ODEMerge(MergeMethod):
    """ODE-M as the paper prints it, with a shortened last step (Lin & Kang, 2026, Algorithm 1).

    One merge costs ceil(t / h) gradients on the calibration set and two passes without gradient. With equal weights
    and no damping anywhere it is the running average.

    Args:
        step_size: Step length h in (0, 1]; 0.05 is the paper's.
        solver: ``"euler"`` (the paper's) or ``"heun"`` (order 2, two gradients per step).
        granularity: Blocks in which the transport is rectified, see :class:`~lightning_odem.flow.RectifiedField`.
            ``"vector"`` (the paper's): all parameters together; ``"tensor"``: each by itself; ``"row"``: each entry of
            the first dimension of those with two or more, which in a weight matrix or a convolution is an output, and
            the others whole; ``"coordinate"``: every weight. Theorem 3.4 holds for all; finer blocks take more out of
            the transport. None needs further gradients or a further vector of the model's size.

    Raises:
        ValueError: For a step size outside (0, 1], an unknown solver or an unknown granularity.
    """

    needs: frozenset[str] = frozenset({"calibration"})

    def __init__(self, step_size: float = 0.05, solver: str = "euler", granularity: str = "vector") -> None:
        if not 0.0 < step_size <= 1.0:
            raise ValueError(f"The step size must lie in (0, 1], got step_size={step_size}.")
        if solver not in SOLVERS:
            raise ValueError(f"Unknown solver {solver!r}; the solvers are {', '.join(sorted(SOLVERS))}.")
        check_choice("granularity", granularity, GRANULARITIES)
        self.step_size = step_size
        self.solver = solver
        self.granularity = granularity

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Integrate from ``merged`` towards ``incoming`` up to time ``t``, in the memory of ``merged``."""
        assert context.calibration is not None, "declared in needs"
        trajectory = integrate(
            merged,
            incoming,
            context.calibration.loss_and_grad,
            t,
            step_size=self.step_size,
            field=RectifiedField(_blocks(context.shapes, self.granularity, merged.device)),
            solver=self.solver,
            loss=context.calibration.loss,
            out=merged,
            on_step=context.on_step,
        )
        return MergeResult(trajectory.theta, trajectory)


def _blocks(shapes: Sequence[tuple[int, ...]], granularity: str, device: torch.device) -> str | Tensor:
    """What :class:`RectifiedField` is to be told: the granularity itself, or the lengths of tensors or rows."""
    if granularity not in ("tensor", "row"):
        return granularity
    rows = [shape[0] if granularity == "row" and len(shape) > 1 else 1 for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    lengths = [torch.full((count,), size // count) for count, size in zip(rows, sizes, strict=True) if size]
    return torch.cat(lengths).to(device)

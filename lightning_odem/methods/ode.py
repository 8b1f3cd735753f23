"""ODE-M: the rectified flow stopped at the operating time (Algorithm 1 of the paper)."""

from torch import Tensor

from lightning_odem.flow import SOLVERS, integrate
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult


class ODEMerge(MergeMethod):
    """ODE-M as the paper prints it, with a shortened last step (Lin & Kang, 2026, Algorithm 1).

    One merge costs ceil(t / h) gradients on the calibration set and two passes without gradient. With equal weights
    and no damping anywhere it is the running average.

    Args:
        step_size: Step length h in (0, 1]; 0.05 is the paper's.
        solver: ``"euler"`` (the paper's) or ``"heun"`` (order 2, two gradients per step).

    Raises:
        ValueError: For a step size outside (0, 1] or an unknown solver.
    """

    needs: frozenset[str] = frozenset({"calibration"})

    def __init__(self, step_size: float = 0.05, solver: str = "euler") -> None:
        if not 0.0 < step_size <= 1.0:
            raise ValueError(f"The step size must lie in (0, 1], got step_size={step_size}.")
        if solver not in SOLVERS:
            raise ValueError(f"Unknown solver {solver!r}; the solvers are {', '.join(sorted(SOLVERS))}.")
        self.step_size = step_size
        self.solver = solver

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Integrate from ``merged`` towards ``incoming`` up to time ``t``, in the memory of ``merged``."""
        assert context.calibration is not None, "declared in needs"
        trajectory = integrate(
            merged,
            incoming,
            context.calibration.loss_and_grad,
            t,
            step_size=self.step_size,
            solver=self.solver,
            loss=context.calibration.loss,
            out=merged,
            on_step=context.on_step,
        )
        return MergeResult(trajectory.theta, trajectory)

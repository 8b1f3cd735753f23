"""ODE-M as the paper prints it."""

from lightning_odem.methods.ode import ODEMerge


class PaperODEMerge(ODEMerge):
    """Algorithm 1 of the paper (Lin & Kang, 2026), with a shortened last step.

    The transport, with its part along the calibration loss's gradient damped where the loss would rise above the chord.
    One merge costs ceil(t / h) gradients on the whole calibration buffer and two passes without gradient. With equal
    weights and no damping anywhere it is the running average.

    Args:
        step_size: Step length h in (0, 1]; 0.05 is the paper's.
        solver: ``"euler"`` (the paper's) or ``"heun"`` (order 2, two gradients per step).
        granularity: Blocks in which the transport is rectified, as in :class:`~lightning_odem.ODEMerge`; ``"vector"``
            is the paper's.

    Raises:
        ValueError: For a step size outside (0, 1], an unknown solver or an unknown granularity.

    Example:
        >>> PaperODEMerge().descent, PaperODEMerge().batch_size
        (0.0, None)
    """

    def __init__(self, step_size: float = 0.05, solver: str = "euler", granularity: str = "vector") -> None:
        super().__init__()

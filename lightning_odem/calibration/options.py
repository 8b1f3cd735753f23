"""How calibration samples are chosen and run."""

from dataclasses import dataclass
from typing import Literal

from lightning_odem.calibration.buffer import QUOTAS


@dataclass(frozen=True)
class CalibrationOptions:
    """Settings of the calibration buffer and its gradients.

    Args:
        batch_size: Samples per micro-batch of a gradient; bounds memory, changes results by rounding only (but for
            ``ode_released``, whose rule counts batches).
        quota: ``"equal"`` places for every task, or ``"utility"`` to share places and loss by utility weight.
        seed: Seed of the choice among a task's samples.
    """

    batch_size: int = 128
    quota: Literal["equal", "utility"] = "equal"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"The calibration batch size must be at least 1, got batch_size={self.batch_size}.")
        if self.quota not in QUOTAS:
            raise ValueError(f"Unknown quota {self.quota!r}; the quotas are {', '.join(QUOTAS)}.")

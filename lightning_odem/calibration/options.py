"""How calibration samples are chosen and run."""

from dataclasses import dataclass
from typing import Literal

from lightning_odem.calibration.buffer import QUOTAS, SHARES, CalibrationBuffer
from lightning_odem.calibration.prediction_loss import LOSSES, missing_logits


@dataclass(frozen=True)
class CalibrationOptions:
    """Settings of the calibration buffer, its loss and its gradients.

    Args:
        batch_size: Samples per micro-batch of a gradient; bounds memory, changes results by rounding only (but for
            ``ode_released``, whose rule counts batches).
        quota: ``"equal"`` places for every task, or ``"utility"`` to share places by utility weight.
        seed: Seed of the choice among a task's samples.
        loss: ``"labels"``, the module's own loss; ``"logits"``, the divergence from what each task's fine-tuned model
            gave for its samples; or ``"entropy"`` of the predictions. Only the first reads labels, also for the choice
            of samples, which it balances by class. The others need a module that gives class scores, see
            :class:`~lightning_odem.calibration.prediction_loss.ClassScores`.
        shares: Each task's share of the loss: as the places are shared (``"quota"``), ``"equal"``, or ``"utility"``, in
            proportion to the utility weights, which then act on the loss as well as on the operating time.
    """

    batch_size: int = 128
    quota: Literal["equal", "utility"] = "equal"
    seed: int = 0
    loss: Literal["labels", "logits", "entropy"] = "labels"
    shares: Literal["quota", "equal", "utility"] = "quota"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"The calibration batch size must be at least 1, got batch_size={self.batch_size}.")
        for what, known in {"quota": QUOTAS, "loss": tuple(LOSSES), "shares": SHARES}.items():
            if (chosen := getattr(self, what)) not in known:
                raise ValueError(f"Unknown {what} {chosen!r}; there are {', '.join(known)}.")

    def buffer(self, capacity: int) -> CalibrationBuffer:
        """An empty buffer of at most ``capacity`` samples."""
        return CalibrationBuffer(capacity, self.quota, self.seed, self.shares, balanced=self.loss == "labels")

    def check(self, buffer: CalibrationBuffer) -> None:
        """Refuse to continue with a buffer whose samples lack what the loss reads.

        Raises:
            ValueError: With the tasks whose samples have no logits, and what to do.
        """
        if self.loss == "logits" and (tasks := buffer.without_logits()):
            raise missing_logits(tasks)

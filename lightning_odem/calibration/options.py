"""How calibration samples are chosen and run."""

from dataclasses import dataclass
from typing import Any, Literal

from lightning_odem.arguments import check_integer, check_seed, shown
from lightning_odem.calibration.buffer import QUOTAS, SHARES, CalibrationBuffer
from lightning_odem.calibration.prediction_loss import LOSSES, missing_logits

_BATCH_SIZE = 128


@dataclass(frozen=True)
class CalibrationOptions:
    """Settings of the calibration buffer, its loss and its gradients.

    Args:
        batch_size: Samples per micro-batch of a gradient; bounds memory. Of losses that are means over the samples it
            changes results by rounding only (but for ``ode_released``, whose rule counts batches), and of other means,
            over tokens or masks, where ``calibration_step`` returns ``(loss, count)``. A loss that compares the samples
            of a batch with each other is another one for every batch size: ``"as trained"`` takes that of the training
            dataloader of the task that is merged, for all tasks, and 128 where there is none.
        quota: ``"equal"`` places for every task, or ``"utility"`` to share places by utility weight.
        seed: Seed of the choice among a task's samples.
        loss: ``"labels"``, the module's own loss; ``"logits"``, the divergence from what each task's fine-tuned model
            gave for its samples; or ``"entropy"`` of the predictions. Only the first reads labels, also for the choice
            of samples, which it balances by class. The others need a module that gives class scores, see
            :class:`~lightning_odem.calibration.prediction_loss.ClassScores`.
        shares: Each task's share of the loss: as the places are shared (``"quota"``), ``"equal"``, or ``"utility"``, in
            proportion to the utility weights, which then act on the loss as well as on the operating time.
    """

    batch_size: int | Literal["as trained"] = _BATCH_SIZE
    quota: Literal["equal", "utility"] = "equal"
    seed: int = 0
    loss: Literal["labels", "logits", "entropy"] = "labels"
    shares: Literal["quota", "equal", "utility"] = "quota"

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, str) and self.batch_size != "as trained":
            raise ValueError(f"The calibration batch size is a number or 'as trained', got {self.batch_size!r}.")
        if not isinstance(self.batch_size, str):
            object.__setattr__(self, "batch_size", check_integer("batch_size", self.batch_size, 1))
        object.__setattr__(self, "seed", check_seed("seed", self.seed))
        for what, known in {"quota": QUOTAS, "loss": tuple(LOSSES), "shares": SHARES}.items():
            if not isinstance(chosen := getattr(self, what), str) or chosen not in known:
                raise ValueError(f"Unknown {what} {shown(chosen)}; there are {', '.join(known)}.")

    def buffer(self, capacity: int) -> CalibrationBuffer:
        """An empty buffer of at most ``capacity`` samples."""
        return CalibrationBuffer(capacity, self.quota, self.seed, self.shares, balanced=self.loss == "labels")

    def micro_batch_size(self, loader: Any = None) -> int:
        """Samples per micro-batch, given the training dataloader, if there is one."""
        if not isinstance(self.batch_size, str):
            return self.batch_size
        known = (getattr(part, "batch_size", None) for part in (loader, getattr(loader, "batch_sampler", None)))
        return next((size for size in known if size), _BATCH_SIZE)

    def check(self, buffer: CalibrationBuffer) -> None:
        """Refuse to continue with a buffer whose samples lack what the loss reads.

        Raises:
            ValueError: With the tasks whose samples have no logits, and what to do.
        """
        if self.loss == "logits" and (tasks := buffer.without_logits()):
            raise missing_logits(tasks)

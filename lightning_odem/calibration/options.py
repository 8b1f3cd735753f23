"""Settings of the calibration: how samples are chosen, and what loss is measured on them."""

from dataclasses import dataclass
from typing import Any, Literal

from lightning_odem.arguments import check_flag, check_integer, check_seed, shown
from lightning_odem.calibration.buffer import QUOTAS, SHARES, CalibrationBuffer
from lightning_odem.calibration.prediction_loss import LOSSES, missing_logits

_BATCH_SIZE = 128


@dataclass(frozen=True)
class CalibrationOptions:
    """Settings of the calibration buffer, its loss and its gradients.

    Args:
        batch_size: Samples per micro-batch of a gradient; it bounds the memory. It changes results by rounding only, if
            the loss is a mean over samples, or if ``calibration_step`` returns ``(loss, count)`` for a mean over tokens
            or masks. The rule ``ode_released`` is an exception: it counts batches. A loss that compares the samples of
            a batch with each other depends on the batch size. ``"as trained"`` takes the batch size of the incoming
            task's training dataloader for all tasks, and 128 if there is none. ``"auto"`` finds the fastest size that
            fits in memory before the stream's first merge of two models, see
            :func:`~lightning_odem.calibration.fastest_size.fastest_micro_batches`. The stream keeps that size. It may
            be another one in another stream of the same models.
        quota: ``"equal"`` gives every task as many places, ``"utility"`` gives places by utility weight.
        seed: Seed of the choice among a task's samples.
        loss: ``"labels"`` is the module's own loss, ``"logits"`` the divergence from the logits of each task's
            fine-tuned model, ``"entropy"`` the entropy of the predictions. Only ``"labels"`` reads labels, for the loss
            and for a class-balanced choice of samples. The others need a module that gives class scores, see
            :class:`~lightning_odem.calibration.prediction_loss.ClassScores`.
        shares: Each task's share of the loss. ``"quota"`` is its share of the places, ``"equal"`` the same for all
            tasks. ``"utility"`` is in proportion to the utility weights, which then act on the loss as well as on the
            operating time.
        in_checkpoints: Whether checkpoints of ``ModelCheckpoint`` carry the samples of earlier tasks. By default they
            refer to the stream's directory, which has to be there when a training is resumed.
        keep_on_device: Whether images and other inputs are brought to a GPU once per merge instead of once per pass, if
            they take at most a quarter of its free memory. Results are the same.
    """

    batch_size: int | Literal["as trained", "auto"] = _BATCH_SIZE
    quota: Literal["equal", "utility"] = "equal"
    seed: int = 0
    loss: Literal["labels", "logits", "entropy"] = "labels"
    shares: Literal["quota", "equal", "utility"] = "quota"
    in_checkpoints: bool = False
    keep_on_device: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, str) and self.batch_size not in ("as trained", "auto"):
            raise ValueError(
                f"The calibration batch size is a number, 'auto' or 'as trained', got {self.batch_size!r}."
            )
        if not isinstance(self.batch_size, str):
            object.__setattr__(self, "batch_size", check_integer("batch_size", self.batch_size, 1))
        check_flag("keep_on_device", self.keep_on_device)
        object.__setattr__(self, "seed", check_seed("seed", self.seed))
        for what, known in {"quota": QUOTAS, "loss": tuple(LOSSES), "shares": SHARES}.items():
            if not isinstance(chosen := getattr(self, what), str) or chosen not in known:
                raise ValueError(f"Unknown {what} {shown(chosen)}; there are {', '.join(known)}.")

    def buffer(self, capacity: int) -> CalibrationBuffer:
        """An empty buffer of at most ``capacity`` samples."""
        return CalibrationBuffer(capacity, self.quota, self.seed, self.shares, balanced=self.loss == "labels")

    def micro_batch_size(self, loader: Any = None, found: int | None = None) -> int:
        """Samples per micro-batch.

        Args:
            loader: The training dataloader, if there is one.
            found: The size that ``"auto"`` has found, if it has.
        """
        if not isinstance(self.batch_size, str):
            return self.batch_size
        if self.batch_size == "auto":
            return found or _BATCH_SIZE
        known = (getattr(part, "batch_size", None) for part in (loader, getattr(loader, "batch_sampler", None)))
        return next((size for size in known if size), _BATCH_SIZE)

    def check(self, buffer: CalibrationBuffer) -> None:
        """Refuse a buffer whose samples lack the logits that the loss reads.

        Raises:
            ValueError: If the loss is ``"logits"`` and a task's samples have none.
        """
        if self.loss == "logits" and (tasks := buffer.without_logits()):
            raise missing_logits(tasks)

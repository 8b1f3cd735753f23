"""The calibration samples of the task that is being fitted."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_odem.calibration.buffer import CalibrationBuffer
from lightning_odem.calibration.containers import CannotBeKeptError
from lightning_odem.calibration.source import Offer, Reservoir, collation, draw

_DEV_SAMPLES = 8


class Sampling:
    """Draws a task's samples when its training starts, or collects them from the batches that pass.

    Args:
        trainer: The Trainer that fits the task.
        task: Name of the task.
        weight: Its utility weight.
        buffer: The buffer of the tasks before; only read.
        given: Calibration data from the user, or None.

    Raises:
        ValueError: If there is no place in the buffer or no source to sample from.
        CannotBeKeptError: If the samples cannot be kept from one task to the next.
    """

    def __init__(self, trainer: L.Trainer, task: str, weight: float, buffer: CalibrationBuffer, given: Any) -> None:
        self._task, self._weight, self._buffer = task, weight, buffer
        # Even a task that gets no place in the buffer shows one sample, so that its loss can be checked.
        room = max(buffer.room_for_next(weight), 1)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            room = min(room, _DEV_SAMPLES)  # goes through every line, measures nothing
        self._collate = collation(trainer)
        try:
            self._offer = draw(trainer, given, room, buffer.generator(), buffer.balanced)
        except CannotBeKeptError as error:
            raise self._refusal(str(error)) from error
        self._reservoir = None
        if self._offer is None:
            if trainer.world_size > 1:
                raise ValueError(
                    f"The training data of task {task!r} is an IterableDataset, of which each process sees another "
                    "part. Give the datamodule a calibration_dataset() or calibration_dataloader()."
                )
            self._reservoir = Reservoir(room, buffer.generator(), self._collate[1])
        origin = self._offer.origin if self._offer else "the training batches as they pass (transforms apply)"
        rank_zero_info(f"Calibration: up to {room} samples of task {task!r} from {origin}.")

    def see(self, batch: Any) -> None:
        """Consider a training batch, where samples cannot be drawn by index.

        Raises:
            CannotBeKeptError: If the first batch cannot be kept.
        """
        if self._reservoir is not None:
            try:
                self._reservoir.update(batch)
            except CannotBeKeptError as error:
                raise self._refusal(f"from the training batches, cannot be kept for later tasks: {error}") from error

    def pair(self) -> CalibrationBuffer | None:
        """Two samples by themselves, to try a loss on; None before any were seen."""
        if self._offer is None:
            return None
        return self._added_to(CalibrationBuffer(capacity=2, balanced=self._buffer.balanced), self._offer)

    def buffer(self) -> CalibrationBuffer:
        """The buffer with this task's samples in it; the one given stays as it is.

        Raises:
            ValueError: If no training batch was seen to collect samples from.
        """
        offer = self._offer
        if self._reservoir is not None and self._reservoir.samples is not None:
            offer = Offer(self._reservoir.samples, "the training batches", transferred=True)
        if offer is None:
            raise ValueError(
                f"No training batch of task {self._task!r} was seen in this process, so there are no calibration "
                "samples. Give the datamodule a calibration_dataset(), or the callback samples in "
                f"calibration_data[{self._task!r}]."
            )
        return self._added_to(self._buffer.copy(), offer)

    def _added_to(self, buffer: CalibrationBuffer, offer: Offer) -> CalibrationBuffer:
        buffer.add(self._task, offer.samples, weight=self._weight, transferred=offer.transferred)
        buffer.collate_by(self._collate[0])
        return buffer

    def _refusal(self, reason: str) -> CannotBeKeptError:
        return CannotBeKeptError(
            f"The calibration samples of task {self._task!r}, {reason}. Give the datamodule a calibration_dataset() of "
            "tensors, or the training dataloader a collate_fn that makes tensors of its samples; a method without "
            "calibration samples, such as 'average', needs neither."
        )

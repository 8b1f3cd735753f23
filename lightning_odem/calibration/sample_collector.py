"""The calibration samples of the task that a Trainer fits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
from torch import Tensor

from lightning_odem.calibration.batches import labels, select
from lightning_odem.calibration.buffer import CalibrationBuffer
from lightning_odem.calibration.containers import CannotBeKeptError
from lightning_odem.calibration.item_loading import OnItem
from lightning_odem.calibration.source import DrawnSamples, Reservoir, collation, draw

_DEV_SAMPLES = 8


class SampleCollector:
    """Draws a task's samples when its training starts, or collects them from the training batches.

    Args:
        trainer: The Trainer that fits the task.
        task: Name of the task.
        weight: Its utility weight.
        buffer: The buffer of the tasks before; it is not changed.
        given: Calibration data from the user, or None.
        on_item: Called with the number of samples that are loaded and that of all.

    Attributes:
        announcement: What is drawn from where, in a line.

    Raises:
        ValueError: If the buffer has no place for the task, or nothing to draw samples from is found.
        CannotBeKeptError: If the samples cannot be kept from one task to the next.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        task: str,
        weight: float,
        buffer: CalibrationBuffer,
        given: Any,
        on_item: OnItem | None = None,
    ) -> None:
        self._task, self._weight, self._buffer = task, weight, buffer
        # A task without a place in the buffer shows one sample too, so that its loss can be checked.
        room = max(buffer.room_for_next(weight), 1)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            room = min(room, _DEV_SAMPLES)  # enough to run every line
        self._collate = collation(trainer)
        try:
            self._drawn = draw(trainer, given, room, buffer.generator(), buffer.balanced, on_item)
        except CannotBeKeptError as error:
            raise self._refusal(str(error)) from error
        self._reservoir = None
        if self._drawn is None:
            if trainer.world_size > 1:
                raise ValueError(
                    f"The training data of task {task!r} is an IterableDataset, and each process sees another part of "
                    "it. Give the datamodule a calibration_dataset() or calibration_dataloader()."
                )
            self._reservoir = Reservoir(room, buffer.generator(), self._collate[1])
        origin = self._drawn.origin if self._drawn else "the training batches as they pass (transforms apply)"
        self.announcement = f"Calibration: up to {room} samples of task {task!r} from {origin}."

    def see(self, batch: Any) -> None:
        """Consider a training batch, if samples cannot be drawn by index.

        Raises:
            CannotBeKeptError: If the first batch cannot be kept.
        """
        if self._reservoir is not None:
            try:
                self._reservoir.update(batch)
            except CannotBeKeptError as error:
                raise self._refusal(f"from the training batches, cannot be kept for later tasks: {error}") from error

    def pair(self) -> CalibrationBuffer | None:
        """A buffer of two samples to try a loss on; None if samples are collected from training batches."""
        if self._drawn is None:
            return None
        return self._added_to(CalibrationBuffer(capacity=2, balanced=self._buffer.balanced), self._drawn)

    def some(self, choose: Callable[[Tensor], Tensor]) -> CalibrationBuffer | None:
        """A buffer of the drawn samples whose indices are chosen by the class labels [n]; None if there are none."""
        found = labels(self._drawn.samples) if self._drawn is not None else None
        if self._drawn is None or found is None or not len(index := choose(found)):
            return None
        chosen = replace(self._drawn, samples=select(self._drawn.samples, index))
        return self._added_to(CalibrationBuffer(capacity=len(index), balanced=False), chosen)

    def buffer(self) -> CalibrationBuffer:
        """A copy of the buffer with this task's samples added.

        Raises:
            ValueError: If samples are collected from training batches and there was none.
        """
        drawn = self._drawn
        if self._reservoir is not None and self._reservoir.samples is not None:
            drawn = DrawnSamples(self._reservoir.samples, "the training batches", transferred=True)
        if drawn is None:
            raise ValueError(
                f"No training batch of task {self._task!r} was seen in this process, so there are no calibration "
                "samples. Give the datamodule a calibration_dataset(), or the callback samples in "
                f"calibration_data[{self._task!r}]."
            )
        return self._added_to(self._buffer.copy(), drawn)

    def _added_to(self, buffer: CalibrationBuffer, drawn: DrawnSamples) -> CalibrationBuffer:
        buffer.add(self._task, drawn.samples, weight=self._weight, transferred=drawn.transferred)
        buffer.collate_by(self._collate[0])
        return buffer

    def _refusal(self, reason: str) -> CannotBeKeptError:
        return CannotBeKeptError(
            f"The calibration samples of task {self._task!r}, {reason}. Give the datamodule a calibration_dataset() of "
            "tensors, or the training dataloader a collate_fn that makes tensors of its samples; a method without "
            "calibration samples, such as 'average', needs neither."
        )

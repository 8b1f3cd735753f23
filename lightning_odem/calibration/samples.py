"""Calibration samples of a task, with the logits that belong to them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from torch import Tensor

from lightning_odem.calibration import batches
from lightning_odem.calibration.batches import Kept
from lightning_odem.calibration.keeping import from_state

_SELECT = partial(batches.select, device=None)  # samples may be on a GPU during a merge
_Held = TypeVar("_Held", "TaskSamples", "MicroBatch")


@dataclass(frozen=True)
class MicroBatch:
    """A part of the calibration set that fits on the device; all its samples are of one task.

    Args:
        samples: A batch as the task's collate function makes it, or
            :class:`~lightning_odem.calibration.batches.Kept`.
        task: Name of the task.
        share: Factor of this batch's mean loss in the calibration loss; the shares of one pass sum to 1.
        transferred: As in :class:`TaskSamples`.
        logits: As in :class:`TaskSamples`.
    """

    samples: Any
    task: str
    share: float
    transferred: bool
    logits: Tensor | None = None

    def select(self, index: Tensor | slice) -> "MicroBatch":
        """The batch of the samples at ``index``, as copies; its share is the same."""
        return _cut(_SELECT, self, index)

    def view(self, index: slice) -> "MicroBatch":
        """The batch of a range of samples, sharing memory with this one; its share is the same."""
        return _cut(batches.view, self, index)


@dataclass(frozen=True)
class TaskSamples:
    """The samples of one task; when places become fewer, the first ones stay.

    Args:
        samples: CPU tensors [n, ...] in plain containers, or :class:`~lightning_odem.calibration.batches.Kept`.
        weight: Utility weight of the task.
        transferred: Whether the samples went through the module's batch-transfer hooks. The hooks are not applied to
            them again then.
        logits: Logits [n, C] that the model fine-tuned on the task gave for the samples, on the CPU and in the dtype of
            the model's output. None if no loss has asked for them.
    """

    samples: Any
    weight: float = 1.0
    transferred: bool = False
    logits: Tensor | None = None

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        return batches.count(self.samples)

    def select(self, index: Tensor | slice) -> "TaskSamples":
        """The samples at ``index``, as copies."""
        return _cut(_SELECT, self, index)

    def view(self, index: slice) -> "TaskSamples":
        """The samples of a range, sharing memory with these."""
        return _cut(batches.view, self, index)

    def state(self) -> dict[str, Any]:
        """The samples as tensors and plain containers."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**state, "samples": None, "kept": self.samples.state()} if isinstance(self.samples, Kept) else state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "TaskSamples":
        """The reverse of :meth:`state`."""
        if "kept" not in state:
            return cls(**state)
        return cls(**{**{name: state[name] for name in state if name != "kept"}, "samples": from_state(state["kept"])})

    def as_batch(self, task: str, share: float) -> MicroBatch:
        """All samples as one micro-batch."""
        return MicroBatch(self.samples, task, share, self.transferred, self.logits)


def _cut(cut: Callable[[Any, Any], Any], held: _Held, index: Tensor | slice) -> _Held:
    logits = None if held.logits is None else cut(held.logits, index)
    return replace(held, samples=cut(held.samples, index), logits=logits)

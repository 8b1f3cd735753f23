"""The need of the incoming task's training data."""

from typing import TYPE_CHECKING

from lightning_odem.calibration.task_data import TaskData
from lightning_odem.methods.needs.need import Need
from lightning_odem.methods.needs.sources import Offer, Sources

if TYPE_CHECKING:
    from lightning_odem.report.record import MergeRecord


class TrainingData(Need[TaskData]):
    """The incoming task's own training batches, see :class:`~lightning_odem.calibration.task_data.TaskData`."""

    source = "the task's training data and a module with a loss"

    def is_met(self, offer: Offer) -> bool:
        """Whether there are batches."""
        return offer.batches

    def build(self, sources: Sources) -> TaskData:
        """The batches, and what the module computes from them."""
        assert sources.batches is not None, "the need is met"
        return TaskData(sources.vector, sources.module, sources.task, sources.batches)  # type: ignore[arg-type]

    def account(self, built: TaskData, record: "MergeRecord") -> None:
        """Count samples that went through a pass with gradient."""
        record.sample_gradients += built.sample_gradients

"""Joint training on all tasks, the upper bound that no merge has to reach."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lightning_odem.calibration.buffer import MicroBatch
from lightning_odem.calibration.loss import ModuleLoss
from lightning_odem.calibration.objective import Counted
from lightning_odem.tasks import Task


class JointTraining(L.LightningModule):
    """Trains a module on all tasks at once: the loss of a step is the mean over tasks of the loss on a batch of each.

    The losses are those of the calibration (``calibration_step(batch, task)``, else ``training_step``), and the
    optimizer is the module's own.

    Args:
        module: The base model, with the heads of all tasks; trained in place.
    """

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Mean loss over the tasks whose batch has a target; None if there is none."""
        loss = ModuleLoss(self.module)
        found = [loss(MicroBatch(samples, task, 1.0, True)) for task, samples in batch.items() if samples is not None]
        losses = [
            loss.loss if isinstance(loss, Counted) else loss
            for loss in found
            if not isinstance(loss, Counted) or loss.count
        ]
        return sum(losses[1:], losses[0]) / len(losses) if losses else None

    def configure_optimizers(self) -> Any:
        """The module's own."""
        return self.module.configure_optimizers()


class JointData(L.LightningDataModule):
    """Batches by name of the task, as many as the largest task has; smaller ones go round.

    Args:
        tasks: The tasks.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self._tasks = tasks

    def train_dataloader(self) -> CombinedLoader:
        """One batch of every task at a time."""
        return CombinedLoader({task.task_name: task.train_dataloader() for task in self._tasks}, "max_size_cycle")

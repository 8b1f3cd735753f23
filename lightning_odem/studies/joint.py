"""Joint training on all tasks at once, an upper bound for merged models."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_odem.calibration.buffer import MicroBatch
from lightning_odem.calibration.loss import ModuleLoss
from lightning_odem.calibration.objective import Counted
from lightning_odem.callback.guards import FreshStart
from lightning_odem.tasks import Task


def train_jointly(
    trainer: L.Trainer, module: L.LightningModule, tasks: Sequence[Task], *, seed: int, fresh_start: FreshStart
) -> None:
    """Train a module on all tasks at once with the Trainer's settings.

    Args:
        trainer: Trains, and is rewound before it does.
        module: The base model, with the heads of all tasks. It is trained in place.
        tasks: The tasks.
        seed: Seed of every random choice of the training.
        fresh_start: Rewinds the Trainer. All fits of a Trainer share one.
    """
    rewind = _Rewind(fresh_start)
    with isolate_rng():
        L.seed_everything(seed, verbose=False)
        trainer.callbacks.append(rewind)  # type: ignore[attr-defined]
        try:
            trainer.fit(JointTraining(module), datamodule=JointData(tasks))
        finally:
            trainer.callbacks.remove(rewind)  # type: ignore[attr-defined]


class JointTraining(L.LightningModule):
    """Trains a module on all tasks at once.

    Each step has one batch per task. Its loss is the mean of the tasks' losses, which are those of the calibration:
    ``calibration_step(batch, task)``, else ``training_step``. The optimizer is the module's own.

    Args:
        module: The base model, with the heads of all tasks. It is trained in place.
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
        """The module's own optimizers."""
        return self.module.configure_optimizers()


class JointData(L.LightningDataModule):
    """Batches by task name, as many as the largest task has. Smaller tasks start over.

    Args:
        tasks: The tasks.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self._tasks = tasks

    def train_dataloader(self) -> CombinedLoader:
        """One batch of every task at a time."""
        return CombinedLoader({task.task_name: task.train_dataloader() for task in self._tasks}, "max_size_cycle")


class _Rewind(L.Callback):
    def __init__(self, fresh_start: FreshStart) -> None:
        self._fresh_start = fresh_start

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._fresh_start.prepare(trainer)

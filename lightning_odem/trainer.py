"""A Trainer that goes through a stream of tasks."""

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_odem.callback import ContinualMergeCallback
from lightning_odem.classifier import TaskClassifier
from lightning_odem.pretraining import pretrain
from lightning_odem.report import StreamReport
from lightning_odem.stream import TaskStream


class ContinualTrainer(L.Trainer):
    """Lightning's Trainer with ``fit_tasks``: fine-tune and merge one task after the other.

    Example::

        trainer = ContinualTrainer(max_epochs=3, callbacks=[ContinualMergeCallback()])
        report = trainer.fit_tasks(model, DigitsStream())
    """

    def fit_tasks(self, model: L.LightningModule, datamodule: TaskStream, pretrain_epochs: int = 0) -> StreamReport:
        """Fine-tune and merge every task of a stream, and print the table.

        Each task is trained for the Trainer's ``max_epochs`` (or ``max_steps``). Without a ContinualMergeCallback
        among the Trainer's callbacks one with its defaults is added.

        Args:
            model: The module; its weights are the base model.
            datamodule: The tasks, in order.
            pretrain_epochs: Epochs to pretrain the base model on the stream's source task first; 0 for a model that
                is pretrained already.

        Returns:
            What was measured.

        Raises:
            ValueError: If pretraining is asked for but the stream has no source task or the module no backbone.
        """
        merge = next((found for found in self.callbacks if isinstance(found, ContinualMergeCallback)), None)  # type: ignore[attr-defined]
        if merge is None:
            merge = ContinualMergeCallback()
            self.callbacks.insert(0, merge)  # type: ignore[attr-defined]
        for task in datamodule:  # bad data of the last task is found before the first is trained
            task.prepare_data()
            task.setup("fit")
        if pretrain_epochs:
            self._pretrain(model, datamodule, pretrain_epochs)
        for number, task in enumerate(datamodule, start=1):
            rank_zero_info(f"Task {number} of {len(datamodule)}: {task.task_name}")
            self.fit(model, datamodule=task)
        rank_zero_only(print)(merge.table())
        if merge.dirpath is not None:
            rank_zero_info(f"Report, table, figures and merged weights: {merge.dirpath}")
        return merge.report

    def _pretrain(self, model: L.LightningModule, stream: TaskStream, epochs: int) -> None:
        if stream.pretraining is None or not isinstance(model, TaskClassifier):
            raise ValueError(
                f"pretrain_epochs={epochs} needs a stream with a source task and a TaskClassifier, got "
                f"{type(stream).__name__} and {type(model).__name__}. Set pretrain_epochs to 0 and load pretrained "
                "weights instead, for example with TaskClassifier's checkpoint."
            )
        rank_zero_info(f"Pretraining the base model on {stream.pretraining.task_name} for {epochs} epochs")
        pretrain(
            model,
            stream.pretraining,
            epochs,
            accelerator=self.strategy.root_device.type,
            fast_dev_run=self.fast_dev_run,  # type: ignore[attr-defined]
            limit_train_batches=self.limit_train_batches,
            enable_progress_bar=self.progress_bar_callback is not None,
        )

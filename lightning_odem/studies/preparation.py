"""What precedes every study and stream: data that is checked, and a base model."""

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_odem.classifiers.classifier import TaskClassifier
from lightning_odem.classifiers.pretraining import pretrain
from lightning_odem.tasks import TaskStream


def prepare(trainer: L.Trainer, model: L.LightningModule, stream: TaskStream, pretrain_epochs: int = 0) -> None:
    """Set up all tasks of a stream, and pretrain the base model if that is asked for.

    Tasks are set up before anything is trained, so that bad data of the last task is found before the first is trained.

    Args:
        trainer: Its accelerator, ``limit_train_batches``, ``fast_dev_run`` and progress bar apply to the pretraining.
        model: The module. Pretraining changes its backbone in place.
        stream: The tasks.
        pretrain_epochs: Epochs on the stream's source task; 0 for a model that is pretrained already.

    Raises:
        ValueError: If pretraining is asked for but the stream has no source task, or the module is no
            :class:`~lightning_odem.classifiers.TaskClassifier`.
    """
    for task in stream:
        task.prepare_data()
        task.setup("fit")
    if not pretrain_epochs:
        return
    if stream.pretraining is None or not isinstance(model, TaskClassifier):
        raise ValueError(
            f"pretrain_epochs={pretrain_epochs} needs a stream with a source task and a TaskClassifier, got "
            f"{type(stream).__name__} and {type(model).__name__}. Set pretrain_epochs to 0 and load pretrained "
            "weights instead, for example with TaskClassifier's checkpoint."
        )
    rank_zero_info(f"Pretraining the base model on {stream.pretraining.task_name} for {pretrain_epochs} epochs")
    pretrain(
        model,
        stream.pretraining,
        pretrain_epochs,
        accelerator=trainer.strategy.root_device.type,
        fast_dev_run=trainer.fast_dev_run,  # type: ignore[attr-defined]
        limit_train_batches=trainer.limit_train_batches,
        enable_progress_bar=trainer.progress_bar_callback is not None,
    )

"""A base model trained locally, for cases in which none can be downloaded."""

import lightning as L

from lightning_odem.classifiers.classifier import TaskClassifier
from lightning_odem.classifiers.pixels import PixelClassifier
from lightning_odem.classifiers.tangent import Linearized
from lightning_odem.tasks import Task


def pretrain(
    model: TaskClassifier | PixelClassifier,
    task: Task,
    max_epochs: int,
    lr: float = 3e-3,
    **trainer_arguments: object,
) -> None:
    """Train a classifier on a source task, in place.

    A :class:`~lightning_odem.classifiers.PixelClassifier` is trained as a whole. In a
    :class:`~lightning_odem.TaskClassifier` the backbone is trained, with a separate head that is thrown away; heads of
    the stream's tasks are not touched. Batch-norm statistics are learnt. For a linearised backbone, the underlying
    network is pretrained, and the result is the expansion point.

    Args:
        model: Classifier that becomes the base model.
        task: Source task.
        max_epochs: Epochs.
        lr: Largest learning rate of the one-cycle schedule; training from scratch tolerates more than fine-tuning.
        **trainer_arguments: Further arguments of the Trainer, such as ``accelerator``.
    """
    trainer = L.Trainer(
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **trainer_arguments,  # type: ignore[arg-type]
    )
    if isinstance(model, PixelClassifier):
        model.lr, fine_tuning = lr, model.lr
        trainer.fit(model, datamodule=task)
        model.lr = fine_tuning
        return
    normalize = model.normalize
    linearized = model.backbone if isinstance(model.backbone, Linearized) else None
    source = TaskClassifier(
        linearized.model if linearized else model.backbone,
        head="train",
        lr=lr,
        freeze_batch_norm=False,
        mean=normalize.mean.flatten().tolist(),
        std=normalize.std.flatten().tolist(),
    )
    trainer.fit(source, datamodule=task)
    if linearized:
        linearized.recenter_()
    # This module's train() and eval() changed the backbone; give it back in the classifier's own mode.
    model.train()

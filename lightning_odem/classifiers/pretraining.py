"""A base model trained locally, for cases in which none can be downloaded."""

import lightning as L

from lightning_odem.classifiers.classifier import TaskClassifier
from lightning_odem.classifiers.tangent import Linearized
from lightning_odem.tasks import Task


def pretrain(model: TaskClassifier, task: Task, max_epochs: int, lr: float = 3e-3, **trainer_arguments: object) -> None:
    """Train a classifier's backbone on a source task, in place; heads of the stream's tasks are not touched.

    A separate head is trained too and thrown away. Batch-norm statistics are learnt. For a linearised backbone, the
    underlying network is pretrained, and the result is the expansion point.

    Args:
        model: Classifier whose backbone becomes the base model.
        task: Source task.
        max_epochs: Epochs.
        lr: Largest learning rate of the one-cycle schedule; training from scratch tolerates more than fine-tuning.
        **trainer_arguments: Further arguments of the Trainer, such as ``accelerator``.
    """
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
    trainer = L.Trainer(
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **trainer_arguments,  # type: ignore[arg-type]
    )
    trainer.fit(source, datamodule=task)
    if linearized:
        linearized.recenter_()
    # This module's train() and eval() changed the backbone; give it back in the classifier's own mode.
    model.train()

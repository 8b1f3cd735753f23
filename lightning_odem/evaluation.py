"""The accuracy of a module on a task's data, outside Lightning's own loops."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_odem.calibration.loss import move_to_device
from lightning_odem.prediction import predict_with_targets


def evaluation_data(trainer: L.Trainer) -> Iterable | None:
    """The data that accuracies of the current task are measured on.

    The test dataloader of the datamodule or module, else its validation dataloader, else the validation dataloaders
    given to ``fit``; None if there is nothing of the kind.
    """
    owners = [(trainer.datamodule, L.LightningDataModule), (trainer.lightning_module, L.LightningModule)]  # type: ignore[attr-defined]
    for owner, parent in owners:
        if owner is not None and is_overridden("test_dataloader", owner, parent):
            owner.setup("test")
            return _chained(owner.test_dataloader())
    # Read where it comes from: without a validation_step Lightning does not load it.
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return _chained(source.dataloader()) if source.is_defined() else None


def data_of(datamodule: L.LightningDataModule) -> Iterable | None:
    """The test data of a datamodule no Trainer has prepared, else its validation data; None if it has neither."""
    datamodule.prepare_data()
    for stage, name in (("test", "test_dataloader"), ("validate", "val_dataloader")):
        if is_overridden(name, datamodule, L.LightningDataModule):
            datamodule.setup(stage)
            return _chained(getattr(datamodule, name)())
    return None


def accuracy(module: L.LightningModule, data: Iterable, task: str) -> float:
    """Fraction of a task's samples classified correctly, in [0, 1]; the module should be in eval mode.

    Predictions come from ``module.prediction_step(batch, task)`` if there is one, which returns scores [B, C] or class
    ids [B] and targets [B]; otherwise from ``module(inputs)`` on batches ``(inputs, targets)``. The Trainer's
    ``limit_test_batches`` applies to each loader.

    Raises:
        ValueError: If there is no sample, or predictions and targets do not fit together.
    """
    correct: list[Tensor] = []
    total = 0
    for batch in _limited(data, module.trainer.limit_test_batches):
        with torch.no_grad():
            scores, targets = predict_with_targets(module, move_to_device(module, batch), task)
        if scores.dim() not in (1, 2) or len(scores) != len(targets) or targets.dim() != 1:
            raise ValueError(
                f"Predictions of {type(module).__name__} on task {task!r} must be scores [B, C] or class ids [B] with "
                f"targets [B], got {tuple(scores.shape)} and {tuple(targets.shape)}. A method "
                "prediction_step(batch, task) -> (predictions, targets) decides what they are."
            )
        predicted = scores.argmax(1) if scores.dim() == 2 else scores
        correct.append((predicted == targets).sum())
        total += len(targets)
    if not total:
        raise ValueError(f"Task {task!r} has no sample to measure an accuracy on.")
    return int(torch.stack(correct).sum()) / total


def _chained(loaders: Any) -> Iterable | None:
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return _Chain(loaders) if loaders else None
    return loaders


class _Chain:
    """Several loaders, one after the other, as often as wanted."""

    def __init__(self, loaders: Iterable) -> None:
        self.loaders = list(loaders)

    def __iter__(self) -> Iterator:
        return chain.from_iterable(self.loaders)


def _limited(data: Any, limit: int | float) -> Iterable:
    """At most ``limit`` batches, or that fraction, of each loader."""
    if limit == 1.0 and isinstance(limit, float):
        return data
    loaders = data.loaders if isinstance(data, _Chain) else [data]
    return chain.from_iterable(
        islice(loader, int(len(loader) * limit) if isinstance(limit, float) else limit) for loader in loaders
    )

"""The accuracy of a module on a task's data, outside Lightning's own loops."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_odem.calibration.loss import move_to_device
from lightning_odem.calibration.prediction import predict_with_targets


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
    ids [B] and targets [B]; otherwise from ``module(inputs)`` on batches ``(inputs, targets)``. Class ids are integers
    or booleans. The Trainer's ``limit_test_batches`` applies to each loader.

    Raises:
        ValueError: If there is no sample, predictions and targets do not fit together, or they are no classes.
    """
    correct: list[Tensor] = []
    total = 0
    for batch in _limited(data, module.trainer.limit_test_batches):
        predicted, targets = _classes(module, batch, task)
        correct.append((predicted == targets).sum())
        total += len(targets)
    if not total:
        raise _no_sample(task)
    return int(torch.stack(correct).sum()) / total


def check_classes(module: L.LightningModule, data: Iterable, task: str) -> None:
    """Predict the first batch of a task's data, and refuse what :func:`accuracy` would refuse of it."""
    for batch in _limited(data, module.trainer.limit_test_batches):
        _classes(module, batch, task)
        return
    raise _no_sample(task)


def _classes(module: L.LightningModule, batch: Any, task: str) -> tuple[Tensor, Tensor]:
    """Predicted and true class ids [B] of a batch."""
    with torch.no_grad():
        scores, targets = predict_with_targets(module, move_to_device(module, batch), task)
    # One column of scores is no choice between classes: its argmax is 0 whatever the score.
    are_classes = (_are_scores(scores) or _are_ids(scores)) and _are_ids(targets)
    if not are_classes or len(scores) != len(targets):
        raise ValueError(
            f"Predictions of {type(module).__name__} on task {task!r} must be scores [B, C] of 2 or more classes, or "
            f"integer class ids [B], with integer targets [B], got {_describe(scores)} and targets "
            f"{_describe(targets)}. A method prediction_step(batch, task) -> (predictions, targets) decides what they "
            "are: of a single logit it can give `logits.flatten() > 0`. A task without classes has no accuracy: "
            "without test and validation data it is NaN."
        )
    # Unsigned integers cannot be compared with others.
    return (scores.argmax(1) if scores.dim() == 2 else scores.long()), targets.long()


def _are_scores(values: Any) -> bool:
    return isinstance(values, Tensor) and values.dim() == 2 and values.shape[1] > 1


def _are_ids(values: Any) -> bool:
    if not isinstance(values, Tensor) or values.dim() != 1:
        return False
    return not (values.is_floating_point() or values.is_complex())


def _describe(values: Any) -> str:
    if not isinstance(values, Tensor):
        return type(values).__name__
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"


def _no_sample(task: str) -> ValueError:
    return ValueError(f"Task {task!r} has no sample to measure an accuracy on.")


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

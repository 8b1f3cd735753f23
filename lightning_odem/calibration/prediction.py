"""A module's predictions outside Lightning's own loops."""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor


def predict(module: L.LightningModule, batch: Any, task: str) -> tuple[Tensor, Tensor | None]:
    """Predictions and targets of a batch on the module's device, under the Trainer's precision.

    They come from the module's ``prediction_step(batch, task)``, whose targets may be None. Without such a method the
    batch is ``(inputs, targets)`` and predictions are ``module(inputs)``.

    Raises:
        ValueError: If the module has no ``prediction_step``, and the batch is no such pair or ``forward`` takes other
            arguments than inputs.
    """
    with module.trainer.precision_plugin.forward_context():
        step: Callable[..., tuple[Tensor, Tensor | None]] | None = getattr(module, "prediction_step", None)
        if step is not None:
            return step(batch, task)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(
                f"A prediction on task {task!r} needs batches (inputs, targets), got {type(batch).__name__}. Give "
                f"{type(module).__name__} a method prediction_step(batch, task) -> (predictions, targets)."
            )
        try:
            return module(batch[0]), batch[1]
        except TypeError as error:  # other arguments than inputs alone
            kind = type(module).__name__
            raise ValueError(
                f"{kind} gives no predictions for the inputs of task {task!r} alone: {error}. "
                f"Give {kind} a method prediction_step(batch, task) -> (predictions, targets)."
            ) from error


def predict_with_targets(module: L.LightningModule, batch: Any, task: str) -> tuple[Tensor, Tensor]:
    """As :func:`predict`, but targets are required.

    Raises:
        ValueError: As :func:`predict`, and if there are no targets.
    """
    predictions, targets = predict(module, batch, task)
    if targets is None:
        raise ValueError(
            f"A batch of task {task!r} has no targets to compare its predictions with. Give the task data with batches "
            "(inputs, targets)."
        )
    return predictions, targets


def split_targets(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Inputs and targets of a batch ``(inputs, targets)``, ``(inputs,)`` or ``inputs``; missing targets are None.

    Raises:
        ValueError: If the batch has another form.

    Example:
        >>> from torch import zeros
        >>> for batch in ((zeros(2, 3), zeros(2)), [zeros(2, 3)], zeros(2, 3)):
        ...     inputs, targets = split_targets(batch)
        ...     inputs.shape, targets is None
        (torch.Size([2, 3]), False)
        (torch.Size([2, 3]), True)
        (torch.Size([2, 3]), True)
    """
    if isinstance(batch, Tensor):
        return batch, None
    if not isinstance(batch, (tuple, list)) or len(batch) not in (1, 2):
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(f"Expected a batch (inputs, targets), or inputs alone, got a {type(batch).__name__}{size}.")
    return batch[0], batch[1] if len(batch) == 2 else None


def labelled(batch: Any, task: str) -> tuple[Tensor, Tensor]:
    """As :func:`split_targets`, but targets are required, since a loss reads them.

    Raises:
        ValueError: As :func:`split_targets`, and if there are no targets.
    """
    inputs, targets = split_targets(batch)
    if targets is None:
        raise ValueError(
            f"Samples of task {task!r} have no labels, which calibration_step reads. Give batches (inputs, labels), or "
            "a calibration loss that reads none: `loss: logits` or `loss: entropy` in the callback's `calibration`."
        )
    return inputs, targets

"""The training of an incoming model, as needs see it."""

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L


@dataclass(frozen=True)
class TrainingRun:
    """One fit, from which a need may collect something.

    Args:
        trainer: The Trainer, with its optimizers set up.
        module: The module that is trained.
        method: Name of the merge method, for errors.
        select: Which parameters are trained and merged, by name.
    """

    trainer: L.Trainer
    module: L.LightningModule
    method: str
    select: Callable[[str], bool]

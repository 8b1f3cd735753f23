"""The data that a task's score is measured on."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden


def evaluation_data(trainer: L.Trainer) -> Iterable | None:
    """The data that the score of the current task is measured on; None if there is none.

    It is the test dataloader of the datamodule, else that of the module, else the validation dataloaders that the fit
    has.
    """
    owners = [(trainer.datamodule, L.LightningDataModule), (trainer.lightning_module, L.LightningModule)]  # type: ignore[attr-defined]
    for owner, parent in owners:
        if owner is not None and is_overridden("test_dataloader", owner, parent):
            owner.setup("test")
            return _chained(owner.test_dataloader())
    # Read at its source, since Lightning does not load it without a validation_step.
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return _chained(source.dataloader()) if source.is_defined() else None


def data_of(datamodule: L.LightningDataModule) -> Iterable | None:
    """The test data, else the validation data, of a datamodule without a Trainer; None if it has neither."""
    datamodule.prepare_data()
    for stage, name in (("test", "test_dataloader"), ("validate", "val_dataloader")):
        if is_overridden(name, datamodule, L.LightningDataModule):
            datamodule.setup(stage)
            return _chained(getattr(datamodule, name)())
    return None


def _chained(loaders: Any) -> Iterable | None:
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return _Chain(loaders) if loaders else None
    return loaders


class _Chain:
    """Several loaders, one after the other; it can be iterated any number of times."""

    def __init__(self, loaders: Iterable) -> None:
        self.loaders = list(loaders)

    def __iter__(self) -> Iterator:
        return chain.from_iterable(self.loaders)


def limited(data: Any, limit: int | float) -> Iterable:
    """At most ``limit`` batches of each loader, or that fraction of them if it is a float."""
    if limit == 1.0 and isinstance(limit, float):
        return data
    loaders = data.loaders if isinstance(data, _Chain) else [data]
    return chain.from_iterable(
        islice(loader, int(len(loader) * limit) if isinstance(limit, float) else limit) for loader in loaders
    )

"""The data that a task's score is measured on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

Stage = Literal["test", "val"]
STAGES: tuple[Stage, ...] = ("test", "val")
Which = int | str
"""Index or name of one of several loaders."""


@dataclass(frozen=True)
class EvaluationData:
    """The batches that a task's score is measured on.

    Args:
        batches: The batches, as often as wanted.
        stage: Whose limit of the Trainer applies: ``limit_test_batches`` or ``limit_val_batches``.
    """

    batches: Iterable
    stage: Stage = "test"

    def limit(self, trainer: L.Trainer) -> int | float:
        """The Trainer's limit: a number of batches, or a fraction of them."""
        return getattr(trainer, f"limit_{self.stage}_batches")

    def limited(self, trainer: L.Trainer) -> Iterator:
        """The batches within the Trainer's limit."""
        limit = self.limit(trainer)
        if isinstance(limit, float) and limit == 1.0:
            return iter(self.batches)
        return islice(self.batches, int(len(self.batches) * limit) if isinstance(limit, float) else limit)  # type: ignore[arg-type]


def is_in_order(data: Iterable | EvaluationData) -> bool:
    """Whether each process that reads some batches gets the same ones in the same order, as far as one can tell."""
    loader = data.batches if isinstance(data, EvaluationData) else data
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    batches = loader.batch_sampler
    samples = batches.sampler if type(batches) is BatchSampler else loader.sampler
    return type(samples) is SequentialSampler and (batches is None or type(batches) is BatchSampler)


def evaluation_data(
    trainer: L.Trainer, task: str, which: Which | None = None, stages: Sequence[Stage] = STAGES
) -> EvaluationData | None:
    """The data that the score of the task being fitted is measured on.

    The test dataloader of the datamodule or module, else its validation dataloader, else the validation dataloaders
    given to ``fit``. None if there is nothing of the kind.

    Args:
        trainer: The Trainer that fits the task.
        task: Name of the task.
        which: The one of several loaders that measures the task; by default the one under the task's name.
        stages: The order in which to look.

    Raises:
        ValueError: If there are several loaders and it is not known which of them measures the task.
    """
    owners = [(trainer.datamodule, L.LightningDataModule), (trainer.lightning_module, L.LightningModule)]  # type: ignore[attr-defined]
    for stage in stages:
        # Read where it comes from: without a validation_step Lightning does not load it.
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        if stage == "val" and source.is_defined():
            return _data(source.dataloader(), "val", task, which)
        for owner, parent in owners if stage == "test" else []:
            if owner is not None and is_overridden("test_dataloader", owner, parent):
                owner.setup("test")
                return _data(owner.test_dataloader(), "test", task, which)
    return None


def data_of(datamodule: L.LightningDataModule, task: str, stages: Sequence[Stage] = STAGES) -> EvaluationData | None:
    """The test data of a datamodule no Trainer has prepared, else its validation data; None if it has neither.

    Raises:
        ValueError: As :func:`evaluation_data`.
    """
    datamodule.prepare_data()
    for stage in stages:
        if is_overridden(f"{stage}_dataloader", datamodule, L.LightningDataModule):
            datamodule.setup({"test": "test", "val": "validate"}[stage])
            return _data(getattr(datamodule, f"{stage}_dataloader")(), stage, task, None)
    return None


def _data(loaders: Any, stage: Stage, task: str, which: Which | None) -> EvaluationData | None:
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    if which is not None and not isinstance(loaders, (Mapping, list, tuple)):
        loaders = [loaders]
    if isinstance(loaders, (Mapping, list, tuple)):
        loaders = _choose(loaders, stage, task, which)
    return None if loaders is None else EvaluationData(loaders, stage)


def _choose(loaders: Any, stage: str, task: str, which: Which | None) -> Iterable | None:
    """The loader of several that measures a task: pooled, the accuracies of other tasks would pass for its own."""
    named = dict(loaders) if isinstance(loaders, Mapping) else dict(enumerate(loaders))
    if which is None and task in named:
        which = task
    if which is None and len(named) <= 1:
        return next(iter(named.values()), None)
    if which is None or which not in named:
        what = {"test": "test", "val": "validation"}[stage]
        found = f"no loader {which!r}" if which is not None else "none of the task's name"
        raise ValueError(
            f"Task {task!r} has {len(named)} {what} dataloaders, {', '.join(map(repr, named))}, and {found}: which of "
            f"them measures it? Give them as a dict with the key {task!r}, or set evaluation_data[{task!r}] of the "
            f"callback to one of {', '.join(map(repr, named))} or to a dataloader."
        )
    return named[which]

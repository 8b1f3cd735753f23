"""What a training run leaves behind besides the weights, collected only where a merge method asks for it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import lightning as L

from lightning_odem.methods.needs import Need, TrainingRun
from lightning_odem.parameters.vector import canonical_name


@dataclass(frozen=True)
class TrainingTrace:
    """What of an incoming model's training a merge method may use.

    Args:
        batches: The task's training batches, one epoch per iteration.
        collected: What needs collected, by their class: ``{SecondMoments: {"weight": ...}}``.
    """

    batches: Iterable[Any] | None = None
    collected: Mapping[type[Need[Any]], Any] = field(default_factory=dict)


def training_batches(trainer: L.Trainer) -> Iterable[Any]:
    """The training batches of the task a Trainer has just fitted, as many per epoch as it used."""
    return Epochs(trainer.train_dataloader, trainer.num_training_batches)


class Epochs:
    """A dataloader as often as wanted, each time the next epoch and at most ``limit`` batches.

    Epochs are counted from 0, so a loader that shuffles by epoch gives the same batches whatever it was used for.

    Args:
        loader: The dataloader.
        limit: Batches per epoch.
    """

    def __init__(self, loader: Any, limit: int | float = math.inf) -> None:
        self._loader, self._limit, self._epoch = loader, limit, 0

    def __iter__(self) -> Iterator[Any]:
        set_epoch = getattr(getattr(self._loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._epoch)
        self._epoch += 1
        return iter(self._loader) if self._limit == math.inf else islice(self._loader, int(self._limit))


class Collection:
    """Collects during one fit what needs want of the training run.

    Args:
        trainer: The Trainer, its optimizers set up.
        module: The module that is trained.
        needs: The needs.
        method: Name of the method that has them, for errors.
        select: Which parameters are merged, by name.
        state: Where needs keep what they see, so that it travels in checkpoints; filled under ``"collected"``.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        needs: Sequence[Need[Any]],
        method: str,
        select: Callable[[str], bool],
        state: dict[str, Any],
    ) -> None:
        trainable = {canonical_name(name) for name, tensor in module.named_parameters() if tensor.requires_grad}
        self._run = TrainingRun(trainer, module, method, lambda name: name in trainable and select(name))
        self._needs = needs
        collecting = [need for need in needs if need.collects]
        # Checkpoints of version 0.5 have the snapshots alone.
        before = {"Snapshots": state.pop("trail")} if "trail" in state else {}
        kept = state.setdefault("collected", before) if collecting else {}
        self._kept = [(need, kept.setdefault(type(need).__name__, {})) for need in collecting]

    def check(self) -> None:
        """Before the training: refuse it if it cannot leave what is needed.

        Raises:
            ValueError: If a need says so, as of an optimizer without second moments.
        """
        for need in self._needs:
            need.check(self._run)

    def see(self) -> None:
        """Called after every training batch."""
        for need, kept in self._kept:
            need.see(self._run, kept)

    def trace(self) -> TrainingTrace:
        """What was collected, at the end of the training."""
        collected = {type(need): need.collect(self._run, kept) for need, kept in self._kept}
        return TrainingTrace(training_batches(self._run.trainer), collected)

"""What a merge method needs of a training run besides the fine-tuned model."""

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
    """What a merge method may use of the incoming model's training.

    Args:
        batches: The task's training batches, one epoch per iteration.
        collected: What each need collected, by its class: ``{SecondMoments: {"weight": ...}}``.
    """

    batches: Iterable[Any] | None = None
    collected: Mapping[type[Need[Any]], Any] = field(default_factory=dict)


def training_batches(trainer: L.Trainer) -> Iterable[Any]:
    """The training batches of the task that a Trainer has just fitted, with its limit on batches per epoch."""
    return Epochs(trainer.train_dataloader, trainer.num_training_batches)


class Epochs:
    """A dataloader that can be iterated any number of times; each time is the next epoch, of at most ``limit`` batches.

    Epochs are counted from 0. So the batches of a loader that shuffles by epoch do not depend on its use before.

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
    """Collects during one fit what a method's needs require of the training run.

    Args:
        trainer: The Trainer, with its optimizers set up.
        module: The module that is trained.
        needs: The needs.
        method: Name of the method, for errors.
        select: Tells by name which parameters are merged.
        state: A dict that is saved in checkpoints. Needs keep what they see in it, under ``"collected"``.
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
        """Refuse a training run that cannot give what is needed; called before the training.

        Raises:
            ValueError: If a need refuses it, for example because the optimizer has no second moments.
        """
        for need in self._needs:
            need.check(self._run)

    def see(self) -> None:
        """Let each need see the run; called after every training batch."""
        for need, kept in self._kept:
            need.see(self._run, kept)

    def trace(self) -> TrainingTrace:
        """The trace of the run; called at the end of the training."""
        collected = {type(need): need.collect(self._run, kept) for need, kept in self._kept}
        return TrainingTrace(training_batches(self._run.trainer), collected)

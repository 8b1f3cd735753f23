"""What a training run leaves behind besides the weights, collected only where a merge method asks for it."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from lightning_odem.parameters.snapshot import Snapshot, take_snapshot
from lightning_odem.parameters.vector import canonical_name

SECOND_MOMENT = "exp_avg_sq"


@dataclass(frozen=True)
class TrainingTrace:
    """What of an incoming model's training a merge method may use.

    Args:
        second_moments: Adam's ``exp_avg_sq`` by name of the parameter, at the end of the training.
        snapshots: Weights by name at evenly spaced steps, the oldest first.
        batches: The task's training batches, one epoch per iteration.
    """

    second_moments: Snapshot | None = None
    snapshots: tuple[Snapshot, ...] = ()
    batches: Iterable[Any] | None = None


def second_moments(optimizers: Iterable[Optimizer], module: nn.Module) -> Snapshot:
    """Adam's running mean of squared gradients by name of the parameter, on the CPU; raw, as the optimizer has it."""
    states = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    return {
        canonical_name(name): states[parameter][SECOND_MOMENT].detach().to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if SECOND_MOMENT in states.get(parameter, {})
    }


def check_second_moments(optimizers: Iterable[Optimizer], method: str) -> None:
    """Refuse optimizers that keep no second moments, before any training.

    Raises:
        ValueError: With the optimizer found and those that would do.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            raise ValueError(
                f"Merge method {method!r} needs the optimizer's second moments, but ZeroRedundancyOptimizer leaves "
                "each process only a part of them. Use the optimizer it wraps."
            )
        if not _keeps_second_moments(optimizer):
            raise ValueError(
                f"Merge method {method!r} needs the optimizer's second moments ({SECOND_MOMENT!r} in its state), but "
                f"{type(optimizer).__name__} keeps none. Train with Adam, AdamW or another of that family, or choose "
                "another method."
            )


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


class Trail:
    """At most ``capacity`` snapshots of a run of unknown length, always evenly spaced in steps.

    Snapshots are taken every ``stride`` steps; when there are too many, every second one goes and the stride doubles.

    Args:
        capacity: Snapshots kept, at least 2.
        state: What an earlier process left in :attr:`state`; empty for a new run.

    Raises:
        ValueError: For a smaller capacity, with which a short run could end without any.

    Example:
        >>> trail = Trail(capacity=4)
        >>> for step in range(1, 20):
        ...     trail.see(step, lambda: {"weight": torch.tensor(float(step))})
        >>> [float(snapshot["weight"]) for snapshot in trail.before(20)]
        [4.0, 8.0, 12.0, 16.0]
    """

    def __init__(self, capacity: int, state: dict[str, Any] | None = None) -> None:
        if capacity < 2:
            raise ValueError(f"A merge method that needs snapshots has to ask for at least 2, got {capacity}.")
        self.capacity = capacity
        self.state: dict[str, Any] = state or {"stride": 1, "snapshots": {}}

    def see(self, step: int, take: Callable[[], Snapshot]) -> None:
        """Take a snapshot of the weights after optimizer step ``step`` if one is due."""
        snapshots = self.state["snapshots"]
        if step == 0 or step % self.state["stride"] or step in snapshots:
            return
        if len(snapshots) == self.capacity:
            self.state["stride"] *= 2
            snapshots = {old: kept for old, kept in snapshots.items() if old % self.state["stride"] == 0}
        if step % self.state["stride"] == 0:
            snapshots = {**snapshots, step: take()}
        # Replaced, not changed: a checkpoint in the making may hold the old one.
        self.state["snapshots"] = snapshots

    def before(self, step: int) -> tuple[Snapshot, ...]:
        """The snapshots of earlier steps, the oldest first."""
        return tuple(kept for at, kept in self.state["snapshots"].items() if at < step)


class Collection:
    """Collects during one fit what a merge method needs of the training run.

    Args:
        trainer: The Trainer, its optimizers set up.
        module: The module that is trained.
        needs: What the method needs.
        method: Its name, for errors.
        capacity: Snapshots wanted.
        select: Which parameters are merged, by name.
        state: Where snapshots are kept, so that they travel in checkpoints; filled under ``"trail"``.

    Raises:
        ValueError: If the second moments are needed and an optimizer keeps none.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        needs: frozenset[str],
        method: str,
        capacity: int,
        select: Callable[[str], bool],
        state: dict[str, Any],
    ) -> None:
        self._trainer, self._module, self._needs = trainer, module, needs
        trainable = {canonical_name(name) for name, tensor in module.named_parameters() if tensor.requires_grad}
        self._select = lambda name: name in trainable and select(name)
        if "second_moments" in needs:
            check_second_moments(trainer.optimizers, method)
        self._trail = None
        if "snapshots" in needs:
            self._trail = Trail(capacity, state.get("trail"))
            state["trail"] = self._trail.state

    def see(self) -> None:
        """Called after every training batch."""
        if self._trail is not None:
            self._trail.see(self._trainer.global_step, lambda: take_snapshot(self._module, self._select))

    def trace(self) -> TrainingTrace:
        """What was collected, at the end of the training."""
        return TrainingTrace(
            second_moments=second_moments(self._trainer.optimizers, self._module)
            if "second_moments" in self._needs
            else None,
            snapshots=self._trail.before(self._trainer.global_step) if self._trail is not None else (),
            batches=training_batches(self._trainer) if "task_data" in self._needs else None,
        )


def _keeps_second_moments(optimizer: Optimizer) -> bool:
    # What an optimizer keeps shows only after a step, so one of its kind takes one on a parameter of no importance.
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones_like(parameter)
    try:
        trial = type(optimizer)([parameter], **optimizer.defaults)
        trial.step()
    except Exception:  # an optimizer that cannot be tried is judged by what it has kept in the end
        return True
    return SECOND_MOMENT in trial.state.get(parameter, {})

"""Fine-tuning of the base model on one task."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_odem.callback.guards import FreshStart
from lightning_odem.methods.needs import Need, combine
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot, undisturbed
from lightning_odem.stream.evaluation import Score, score
from lightning_odem.stream.trace import Collection
from lightning_odem.studies.fine_tuned_cache import FineTuned
from lightning_odem.studies.fine_tuned_cache import FineTunedCache as FineTunedCache  # imported from here until 0.6
from lightning_odem.tasks import Task

SPLITS = ("val", "test")


def fine_tune(
    trainer: L.Trainer,
    model: L.LightningModule,
    task: Task,
    division: Division,
    *,
    seed: int,
    fresh_start: FreshStart,
    needs: Iterable[Need[Any]] = (),
    given: Mapping[str, Tensor] | None = None,
) -> FineTuned:
    """Fine-tune a copy of the base model on one task with the Trainer's settings.

    Args:
        trainer: Trains, and is rewound before it does.
        model: The base model. It is not changed.
        task: The task.
        division: Which parameters are merged.
        seed: Seed of every random choice of the training.
        fresh_start: Rewinds the Trainer. All fits of a Trainer share one.
        needs: Needs that collect during the training.
        given: Weights of a model fine-tuned elsewhere. If given, nothing is trained: the task's own parameters, such as
            probes, are fitted on the base model, and scores are measured.
    """
    harvest = _Harvest(task, division, fresh_start, combine(needs), given)
    trainer.callbacks.append(harvest)  # type: ignore[attr-defined]
    try:
        with isolate_rng():
            L.seed_everything(seed, verbose=False)
            trainer.fit(deepcopy(model), datamodule=task)
    except _Measured:
        pass
    finally:
        trainer.callbacks.remove(harvest)  # type: ignore[attr-defined]
    assert harvest.result is not None, "a fit that trained nothing has nothing to compare"
    return harvest.result


class _Measured(Exception):
    """Ends a fit in which nothing is trained."""


class _Harvest(L.Callback):
    """Takes the fine-tuned model from a fit."""

    def __init__(
        self,
        task: Task,
        division: Division,
        fresh_start: FreshStart,
        needs: Sequence[Need[Any]],
        given: Mapping[str, Tensor] | None,
    ) -> None:
        self.result: FineTuned | None = None
        self._fresh_start = fresh_start
        self._task, self._division, self._needs, self._given = task, division, needs, given
        self._collection: Collection | None = None
        self._pretrained: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._fresh_start.prepare(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_shared = self._division.shared(pl_module)
        self._collection = Collection(trainer, pl_module, self._needs, "comparison", is_shared, {})

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Heads are ready now, and no step has been taken yet.
        if self._pretrained:
            return
        self._pretrained = self._scores(pl_module)
        if self._given is not None:
            load_snapshot(pl_module, dict(self._given), lambda name: name in self._given)  # type: ignore[operator]
            self._take(pl_module)
            raise _Measured

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._collection is not None:
            self._collection.see()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = self._take(pl_module)
        assert self._collection is not None, "set up when the training started"
        model.collected = self._collection.trace().collected

    def _take(self, module: L.LightningModule) -> FineTuned:
        is_shared = self._division.shared(module)
        self.result = FineTuned(
            weights=take_snapshot(module, is_shared),
            own=take_snapshot(module, lambda name: not is_shared(name)),
            collected={type(need): None for need in self._needs if need.collects},
            pretrained=self._pretrained,
            fine_tuned=self._scores(module),
        )
        return self.result

    def _scores(self, module: L.LightningModule) -> dict[str, float]:
        with undisturbed(module):
            return {split: measure(module, self._task, split).value for split in SPLITS}


def measure(module: L.LightningModule, task: Task, split: str) -> Score:
    """Score of a module on a task. The module has a Trainer and is in eval mode."""
    return score(module, loader(task, split), task.task_name, task)


def loader(task: Task, split: str) -> Any:
    """Dataloader of the split on which scores are measured."""
    return task.test_dataloader() if split == "test" else task.val_dataloader()


def load_own(module: L.LightningModule, own: Snapshot) -> None:
    """Load a task's own parameters into a module, which creates missing heads as for a checkpoint."""
    module.on_load_checkpoint({"state_dict": dict(own)})
    found = module.load_state_dict(own, strict=False)
    if found.unexpected_keys:
        raise ValueError(
            f"{type(module).__name__} has no place for {', '.join(found.unexpected_keys)}, which are a task's own. "
            "Create them in on_load_checkpoint, as for Lightning's checkpoints."
        )

"""Fine-tuned models: trained once, kept in files, found again by what made them."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_odem.callback.guards import FreshStart
from lightning_odem.methods.needs import Need, combine
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.files import replacing
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot, undisturbed
from lightning_odem.stream.evaluation import Score, score
from lightning_odem.stream.store import decode, encode
from lightning_odem.stream.trace import Collection
from lightning_odem.studies.training_fingerprint import fingerprint
from lightning_odem.tasks import Task

SPLITS = ("val", "test")


@dataclass
class FineTuned:
    """A model fine-tuned on one task, and what its training left behind.

    Args:
        weights: Parameters and buffers that are merged, by name.
        own: What belongs to the task alone, such as its head.
        collected: What needs collected during the training, by their class; None where there was no training.
        pretrained: Score of the base model on the task, by split.
        fine_tuned: Score of this model on it, by split.
    """

    weights: Snapshot
    own: Snapshot
    collected: Mapping[type[Need[Any]], Any] = field(default_factory=dict)
    pretrained: dict[str, float] = field(default_factory=dict)
    fine_tuned: dict[str, float] = field(default_factory=dict)


class FineTunedCache:
    """Fine-tuned models as files, one pair of ``.safetensors`` and ``.json`` each; the JSON says what made it.

    Args:
        directory: Where the files are; made when the first is written.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)

    def path(self, task: str, description: Any) -> Path:
        """The model's ``.safetensors``, which need not exist."""
        return self.directory / f"{task}-{fingerprint(description)}.safetensors"

    def load(self, task: str, description: Any, needs: Iterable[Need[Any]] = ()) -> FineTuned | None:
        """The model made as described, or None; also None if one of the needs did not collect while it was trained."""
        path = self.path(task, description)
        if not path.with_suffix(".json").exists():
            return None
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        parts = _split(load_file(path))
        collected = _collected(facts, parts)
        wanted = {type(need) for need in needs if need.collects}
        if any(kind.__name__ not in collected for kind in wanted):
            return None
        return FineTuned(
            weights=parts["weights"],
            own=parts.get("own", {}),
            collected={kind: collected[kind.__name__] for kind in wanted},
            pretrained=facts["pretrained"],
            fine_tuned=facts["fine_tuned"],
        )

    def save(self, task: str, description: Any, model: FineTuned) -> None:
        """Write a model; it is there when its JSON is, so a write broken off leaves nothing that could be loaded."""
        structure, collected = encode({kind.__name__: found for kind, found in model.collected.items()}, "collected")
        parts = {"weights": model.weights, "own": model.own, "collected": collected}
        tensors = {
            f"{part}/{name}": tensor.contiguous() for part, held in parts.items() for name, tensor in held.items()
        }
        facts = {
            "task": task,
            "collected": structure,
            "pretrained": model.pretrained,
            "fine_tuned": model.fine_tuned,
            "made_by": description,
        }
        path = self.path(task, description)
        with replacing(path) as draft:
            save_file(tensors, draft)
        with replacing(path.with_suffix(".json")) as draft:
            draft.write_text(json.dumps(facts, indent=1, default=repr), encoding="utf-8")


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
        trainer: Trains and is rewound for the next task.
        model: The base model; stays as it is.
        task: The task.
        division: Which parameters are merged.
        seed: Governs every random choice of the training.
        fresh_start: Rewinds the Trainer; one for all fits of a Trainer.
        needs: What is to collect during the training.
        given: Weights of a model fine-tuned elsewhere. Nothing is trained then; only what the task needs besides
            (probes fitted on the base model) is made, and scores are measured.
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
    """Ends a fit in which nothing is to be trained."""


class _Harvest(L.Callback):
    """Takes what one fit makes."""

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
        # Heads are ready now, and no step was taken yet.
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
    """Score of a module, which has a Trainer and is in eval mode, on a task."""
    return score(module, loader(task, split), task.task_name, task)


def loader(task: Task, split: str) -> Any:
    """The task's batches to measure scores on."""
    return task.test_dataloader() if split == "test" else task.val_dataloader()


def load_own(module: L.LightningModule, own: Snapshot) -> None:
    """Give a module what belongs to a task, making heads it does not have yet as for a checkpoint."""
    module.on_load_checkpoint({"state_dict": dict(own)})
    found = module.load_state_dict(own, strict=False)
    if found.unexpected_keys:
        raise ValueError(
            f"{type(module).__name__} has no place for {', '.join(found.unexpected_keys)}, which belong to a task. "
            "Create them in on_load_checkpoint, as for Lightning's checkpoints."
        )


def _collected(facts: Mapping[str, Any], parts: Mapping[str, Snapshot]) -> dict[str, Any]:
    """What needs collected, by the name of their class."""
    if "collected" in facts:
        return decode(facts["collected"], parts.get("collected", {}))
    # A file of version 0.5 has the second moments, and snapshots where they were wanted.
    snapshots = tuple(parts[f"snapshot{number}"] for number in range(facts["snapshots"]))
    return {"SecondMoments": parts.get("second_moments", {}), **({"Snapshots": snapshots} if snapshots else {})}


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Snapshot]:
    parts: dict[str, Snapshot] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts

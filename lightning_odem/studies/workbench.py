"""The fine-tuned models of a stream and a module to merge them in, made once and used by every study."""

from collections.abc import Iterable, Mapping
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_odem import version
from lightning_odem.callback.callback import ContinualMergeCallback
from lightning_odem.callback.guards import FreshStart
from lightning_odem.methods import MergeMethod
from lightning_odem.methods.needs import Need, SecondMoments, combine
from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.snapshot import Snapshot, take_snapshot
from lightning_odem.stream.attach import attached
from lightning_odem.stream.stream import Stream
from lightning_odem.studies.fine_tuned_cache import FineTuned, FineTunedCache
from lightning_odem.studies.finetuning import SPLITS, fine_tune, load_own, measure
from lightning_odem.studies.joint import train_jointly
from lightning_odem.studies.plan import StreamPlan
from lightning_odem.studies.training_fingerprint import describe_training, fingerprint, hash_tensors
from lightning_odem.tasks import Task, TaskStream


class Workbench:
    """Fine-tunes a stream's tasks from one base model, each once per seed, and keeps the results in files.

    A :class:`~lightning_odem.ContinualMergeCallback` among the Trainer's callbacks is removed from them. Its
    ``exclude``, ``batch_norm`` and ``calibration`` apply.

    Args:
        trainer: Fine-tunes with its own settings, on one device.
        model: The base model.
        stream: The tasks.
        directory: Where the files are kept.
        checkpoints: Models fine-tuned elsewhere, by task name, or one path for all with ``{task}`` in it. Other tasks
            are fine-tuned here. Checkpoints are read by the model's ``read_checkpoint(path)`` if it has one, else by
            :func:`~lightning_odem.parameters.read_checkpoint`.
        needs: Needs of the methods. What they collect during a training is kept with its model.

    Raises:
        ValueError: If the Trainer has several processes, or a checkpoint is given for an unknown task.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        stream: TaskStream,
        directory: str | Path,
        checkpoints: Mapping[str, str] | str | None = None,
        needs: Iterable[Need[Any]] = (),
    ) -> None:
        if trainer.world_size > 1:
            raise ValueError(
                f"Studies run in one process, but the Trainer has {trainer.world_size}. Set its devices to 1."
            )
        if isinstance(checkpoints, str):
            checkpoints = {name: checkpoints.format(task=name) for name in stream.names}
        if unknown := [name for name in checkpoints or {} if name not in stream.names]:
            raise ValueError(f"checkpoints has unknown tasks {unknown}; the stream has {', '.join(stream.names)}.")
        self.trainer, self.model, self.stream = trainer, model, stream
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, ContinualMergeCallback)]
        self.settings = found[0] if found else ContinualMergeCallback()
        self._directory = Path(directory)
        trainer.callbacks = [other for other in callbacks if other not in found]  # type: ignore[attr-defined]
        self.division = self.settings.division
        self.division.check(model)
        self.base: Snapshot = take_snapshot(model, self.division.shared(model))
        self._checkpoints = dict(checkpoints or {})
        # Second moments cost no more than the space they take, and a method that needs them may be compared later.
        self._needs = combine([SecondMoments(), *needs])
        self._cache = FineTunedCache(self._directory / "fine_tuned")
        self._fresh_start = FreshStart()
        self._descriptions: dict[tuple[int, str], Any] = {}
        self._modules: dict[int, L.LightningModule] = {}

    def describe(self, seed: int, task: str) -> Any:
        """Describe what decides the fine-tuned model of a task as plain data."""
        if (seed, task) not in self._descriptions:
            description = describe_training(self.model, self._task(seed, task), self.trainer, seed)
            # Decides which tensors are merged and which are the task's own.
            description["exclude"] = list(self.division.patterns(self.model))
            if task in self._checkpoints:
                description["checkpoint"] = hash_tensors(self._given(task) or {})
            self._descriptions[seed, task] = description
        return self._descriptions[seed, task]

    def fine_tuned(self, seed: int, task: str) -> FineTuned:
        """Read the fine-tuned model of a task from its file, or fine-tune it."""
        description = self.describe(seed, task)
        model = self._cache.load(task, description, self._needs)
        if model is None:
            number = self.stream.names.index(task) + 1
            rank_zero_info(f"Fine-tuning task {number} of {len(self.stream)}: {task} (seed {seed})")
            model = fine_tune(
                self.trainer,
                self.model,
                self._task(seed, task),
                self.division,
                seed=seed,
                fresh_start=self._fresh_start,
                needs=self._needs,
                given=self._given(task),
            )
            self._cache.save(task, description, model)
        return model

    def module(self, seed: int) -> L.LightningModule:
        """Give a module with each task's own parameters, such as heads. Its shared weights are arbitrary."""
        if seed not in self._modules:
            module = deepcopy(self.model)
            for task in self.stream.names:
                load_own(module, self.fine_tuned(seed, task).own)
            self._modules = {seed: module}
        return self._modules[seed]

    def begin(self, method: MergeMethod, plan: StreamPlan) -> Stream:
        """Begin the stream of a plan with the callback's settings, before its first task."""
        options = self.settings.calibration
        return Stream(
            method,
            base=self.base,
            calibration_size=plan.calibration_size,
            exclude=self.division.exclude,
            batch_norm=self.settings.batch_norm,
            calibration=replace(options, seed=options.seed + plan.seed),
        )

    def joint(self, seed: int, split: str) -> dict[str, float]:
        """Score on each task of the base model after joint training on all tasks."""
        tasks = [self._task(seed, name) for name in self.stream.names]
        description = {"joint": [self.describe(seed, task.task_name) for task in tasks]}
        found = self._cache.load("joint", description)
        if found is None:
            rank_zero_info(f"Training jointly on all {len(tasks)} tasks (seed {seed})")
            module = deepcopy(self.module(seed))
            train_jointly(self.trainer, module, tasks, seed=seed, fresh_start=self._fresh_start)
            found = FineTuned(weights=take_snapshot(module, self.division.shared(module)), own={})
            with attached(module, self.trainer):
                for part in SPLITS:
                    found.fine_tuned |= {
                        f"{part}/{task.task_name}": measure(module, task, part).value for task in tasks
                    }
            self._cache.save("joint", description, found)
        return {name: found.fine_tuned[f"{split}/{name}"] for name in self.stream.names}

    def fingerprint(self, seed: int, tasks: tuple[str, ...], *more: Any) -> str:
        """Hash the descriptions of the fine-tuned models in an order, and all else that decides a result."""
        # Defaults and rules change between versions of this package; trained models do not.
        settings = [version.__version__, self.settings.batch_norm, repr(self.settings.calibration)]
        return fingerprint([[self.describe(seed, task) for task in tasks], settings, *more])

    def _task(self, seed: int, name: str) -> Task:
        task = copy(self.stream[name])  # the data itself is shared
        task.seed += seed
        return task

    def _given(self, task: str) -> dict[str, Tensor] | None:
        if task not in self._checkpoints:
            return None
        # A module may read model hubs too, and knows how their tensor names differ from its own.
        read = getattr(self.model, "read_checkpoint", read_checkpoint)
        return dict(read(self._checkpoints[task]))

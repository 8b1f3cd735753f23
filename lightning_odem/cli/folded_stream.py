"""Checkpoints folded in a module, with samples of their tasks on which to measure its loss."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_odem.cli.inputs import Incoming
from lightning_odem.methods import MergeMethod
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.model_files import ModelFiles
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot
from lightning_odem.parameters.vector import canonical_name
from lightning_odem.report import MergeRecord
from lightning_odem.stream.stream import Stream
from lightning_odem.stream.trace import TrainingTrace, training_batches
from lightning_odem.tasks import Task, TaskStream


def choose_tasks(stream: TaskStream, names: Sequence[str], by_name: bool = False) -> list[Task]:
    """Choose the tasks of a stream for checkpoints: by their names, or all in order if the stream has no such name.

    Args:
        stream: The stream.
        names: Names of the checkpoints.
        by_name: Whether to choose by name only.

    Raises:
        ValueError: If some names are known but not all, or there are more or fewer checkpoints than tasks.
    """
    known = [name for name in names if name in stream.names]
    if len(known) == len(names):
        return [stream[name] for name in names]
    if known or by_name or len(names) != len(stream):
        raise ValueError(
            f"The checkpoints {', '.join(names)} do not go with the tasks of the stream: {', '.join(stream.names)}. "
            "Name the task of each checkpoint in tasks, or give as many checkpoints as there are tasks."
        )
    return list(stream)


class FoldedStream:
    """Folds checkpoints in a LightningModule; each merge is a ``fit`` on the task's data that does not train.

    So module and data are set up as in training. The module has its device, its transfer hooks and what it makes at the
    start of a training, such as the probes of :class:`~lightning_odem.TaskClassifier`. The probes see the base model,
    or the incoming model if there is no base model. Parameters that belong to a task come from its checkpoint.

    Args:
        model: The module; its own weights do not matter.
        tasks: The tasks of the checkpoints.
        incoming: The checkpoints; all are checked here, none is merged.
        base: Path of the base model, or None.
        device: Where merges are computed.
        method: The merge method.
        exclude: Patterns of parameters that are not merged, besides the module's ``task_specific``.
        batch_norm: Policy for running statistics.
        **options: Further arguments of :class:`~lightning_odem.stream.stream.Stream`.

    Attributes:
        hyper_parameters: Entries for ``load_from_checkpoint``, from the module.
        notes: What a user should know about the result, a line each.

    Raises:
        ValueError: If the models differ, or a pattern matches nothing.
    """

    def __init__(
        self,
        model: L.LightningModule,
        tasks: Sequence[Task],
        incoming: Sequence[Incoming],
        base: str | None,
        device: str,
        method: MergeMethod,
        exclude: Sequence[str],
        batch_norm: str,
        **options: Any,
    ) -> None:
        self._model = model
        self._tasks = {task.task_name: task for task in tasks}
        self._division = Division(exclude)
        shared = self._division.shared(model)
        own = {name: tensor for name, tensor in _canonical(model.state_dict().items()).items() if shared(name)}
        self._files = ModelFiles([entry.path for entry in incoming], base, self._division.patterns(model), own)
        self._base = self._complete(self._files.read(base)) if base is not None else None
        self._stream = Stream(method, base=self._base, exclude=tuple(exclude), batch_norm=batch_norm, **options)
        self._stream.division.check(model)
        for task in tasks:  # so that bad data of the last task is found before the first merge
            task.prepare_data()
            task.setup("fit")
        chosen = torch.device(device)
        self._trainer_options: dict[str, Any] = {
            "accelerator": chosen.type,
            "devices": 1 if chosen.index is None else [chosen.index],
        }
        self.notes: list[str] = []
        self.hyper_parameters: dict[str, Any] = {}
        if model.hparams:
            self.hyper_parameters = {"hparams_name": model._hparams_name, "hyper_parameters": dict(model.hparams)}

    def fold(self, incoming: Incoming, on_step: Callable[[int, int], None]) -> MergeRecord:
        """Read and merge the next checkpoint."""
        callback = _FoldInstead(self, incoming, on_step)
        trainer = L.Trainer(
            **self._trainer_options,
            max_epochs=1,
            callbacks=[callback],
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        load_snapshot(self._model, self._base or self._read(incoming.path), self._division.shared(self._model))
        trainer.fit(self._model, datamodule=self._tasks[incoming.task])
        assert callback.record is not None, "the fit ended without an error"
        return callback.record

    def state(self) -> Snapshot:
        """The merged model with the parameters of every task."""
        return {name: tensor.clone() for name, tensor in _canonical(self._model.state_dict().items()).items()}

    def merged(self) -> Snapshot:
        """The tensors that were merged."""
        return {name: tensor for name, tensor in self.state().items() if name in self._files.like}

    def load_task_specific(self, path: str) -> None:
        """Write the parameters of a checkpoint's task into the module.

        Raises:
            ValueError: If the checkpoint lacks parameters that are trained with its task.
        """
        stored = self._files.read_excluded(path)
        own = _canonical(self._model.state_dict().items())
        needed = self._division.task_specific(self._model)
        if absent := [name for name in own if needed(name) and name not in stored]:
            raise ValueError(
                f"{path} lacks {', '.join(sorted(absent))}, which belong to its task and are trained with it. Give the "
                "checkpoint of the whole module, or a module that does not train them."
            )
        stored = {name: tensor for name, tensor in stored.items() if name in own}
        load_snapshot(self._model, stored, lambda name: name in stored)

    def merge(self, trainer: L.Trainer, incoming: Incoming, on_step: Callable[[int, int], None]) -> MergeRecord:
        """Merge a checkpoint in the middle of a fit."""
        path, task, weight = incoming
        dataset = self._tasks[task].calibration_dataset
        samples = self._stream.draw(dataset(), weight) if self._stream.needs_samples else None
        trace = TrainingTrace(batches=training_batches(trainer))
        return self._stream.merge(self._model, self._read(path), task, weight, samples, trace, on_step)

    def _read(self, path: str) -> Snapshot:
        return self._complete(self._files.read(path))

    def _complete(self, state: Snapshot) -> Snapshot:
        """The model as a snapshot, including buffers that are not part of a state dict, with each tied tensor once."""
        tensors = [*self._model.named_parameters(), *self._model.named_buffers()]
        shared = self._division.shared(self._model)
        return {name: state.get(name, own) for name, own in _canonical(tensors).items() if shared(name)}


def _canonical(tensors: Iterable[tuple[str, Tensor]]) -> Snapshot:
    return {canonical_name(name): tensor for name, tensor in tensors}


class _FoldInstead(L.Callback):
    """Merge instead of training."""

    def __init__(self, folded: FoldedStream, incoming: Incoming, on_step: Callable[[int, int], None]) -> None:
        self._folded, self._incoming, self._on_step = folded, incoming, on_step
        self.record: MergeRecord | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # This runs before the module's own hook, which may fit a head to the weights unless it has one.
        self._folded.load_task_specific(self._incoming.path)
        trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.record = self._folded.merge(trainer, self._incoming, self._on_step)

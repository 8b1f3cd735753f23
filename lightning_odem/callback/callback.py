"""The callback: when things happen in a Trainer's life. What happens is in the other files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_odem.arguments import (
    check_choice,
    check_instance,
    check_integer,
    check_names,
    check_path,
    check_patterns,
)
from lightning_odem.calibration import CalibrationOptions
from lightning_odem.calibration.batch_norm import POLICIES
from lightning_odem.calibration.task_samples import Sampling
from lightning_odem.callback.fit import Fit, Phase
from lightning_odem.callback.guards import (
    FreshStart,
    check_no_spawning,
    check_trainer,
    finish_averages,
    release_averages,
)
from lightning_odem.callback.publication import publish
from lightning_odem.callback.rescue import rescuing
from lightning_odem.flow import operating_time
from lightning_odem.methods import MergeMethod, method_name
from lightning_odem.metrics import check_weights
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.shards import local, reshard
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot, undisturbed
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.report import MergeRecord, StreamReport, render_summary
from lightning_odem.report.progress import progress
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.measurement import Measurement
from lightning_odem.stream.naming import file_name, next_task_name, next_task_weight
from lightning_odem.stream.random_state import RandomStream, load_random_state, take_random_state
from lightning_odem.stream.removal import Model, remove_task
from lightning_odem.stream.restoration import is_ready, restore_task_parameters
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store import differences, encode, fingerprint
from lightning_odem.stream.stream import Stream
from lightning_odem.stream.trace import Collection

_Data = TypeVar("_Data", bound=L.LightningDataModule)

FINETUNE_FROM = ("base", "merged")
OFFLOADS = ("cpu", "disk")
EVALUATE = ("every", False)


class ContinualMergeCallback(L.Callback):
    r"""Merges each fine-tuned model into one deployed model: one ``fit`` is one task.

    The module's weights when the first fit starts are the base model. Every later fit fine-tunes from them again. When
    its training ends the callback merges the fine-tuned model, whose share is the operating time
    :math:`t_k = w_k / (w_1 + \dots + w_k)`. By default the task is added to the sum of all tasks, calibration samples
    choose how far to go from the base model along it, and a gradient flow from there is kept as far as held-out samples
    confirm it, see :class:`~lightning_odem.methods.ODEMerge`. The module then holds the merged model; every task seen
    is evaluated, the numbers go to the loggers (step = number of the task), to ``report`` and to ``dirpath``.

    The module needs nothing but ``training_step`` on batches ``(inputs, targets)`` and ``forward(inputs)`` that gives
    predictions. It may define

    - ``calibration_step(batch, task) -> loss`` to be used instead of ``training_step``, which is called with logging
      switched off; or ``-> (loss, count)`` where the loss is a mean over tokens, masks or pairs, with their number;
    - ``prediction_step(batch, task) -> (predictions, targets)`` to be used instead of ``forward``;
    - ``task_metric(task)``, the ``torchmetrics.Metric`` of a task, or a collection whose first entry is its score. By
      default it is the accuracy of class scores [B, C] or ids [B]; what it cannot measure is refused before training.
      The datamodule may define it too;
    - ``task_specific``, a tuple of patterns like ``exclude``, for parameters such as the heads of single tasks.

    The datamodule may define ``task_name``, ``task_weight``, and ``calibration_dataset()`` or
    ``calibration_dataloader()`` for samples without augmentation.

    Note:
        ``ModelCheckpoint`` writes its files before the merge: they hold fine-tuned, unmerged weights. Test with
        ``trainer.test(model, datamodule)``, or with ``ckpt_path=callback.last_merged_path``.

    **Streams that last.** After each merge the stream's state is in the folder ``stream`` of its directory, written in
    one step: a process killed at any moment leaves the state before or after the merge, never half of one. A new
    callback with that ``dirpath`` goes on with the stream, see :meth:`remaining`; its module has to start with the
    weights of the base model (:meth:`load_base`). If the process was seeded, before the callback was made, as the one
    that began the stream, and that one set no seeds between tasks, random numbers go on where the last merge left
    them (or begin with the seed, where Lightning sets it for each fit: after ``seed_everything`` under strategies for
    several processes): the result is that of one process, bit for bit. While a task is fitted no other process can fit
    one.

    **Several processes** share the evaluations of the calibration loss; every one takes the same steps. They may hold
    the parameters whole (``strategy="ddp"``) or share them by FSDP2 (``ModelParallelStrategy``), where each holds and
    merges its own shards; some methods need whole tensors and are refused then.

    Args:
        method: Name of a merge method, ``"ode"`` (see above), ``"ode_paper"`` (Algorithm 1 of ODE-M), ``"average"``
            or another of :data:`~lightning_odem.methods.METHODS`, or a :class:`~lightning_odem.methods.MergeMethod`.
        weights: Utility weights by task name, or a list in the order of the tasks; by default the datamodule's
            ``task_weight``, else 1. Non-negative and finite.
        calibration_size: Samples kept of all tasks together, N. 1024 is the paper's.
        finetune_from: ``"base"`` fine-tunes every task from the base model, as model merging assumes; ``"merged"``
            from the merged model.
        exclude: Patterns of parameters that are not merged and kept per task: globs over dotted names, or names of
            modules, for example ``["head", "*.adapter.*"]``. A task's training starts with those the module has: its
            predecessor's, unless they are set between the fits.
        dirpath: Directory of the stream: its state, checkpoints, report and figures. One that holds a stream is gone
            on with. By default the next free ``merge_runs/version_N`` in the Trainer's root directory.
        batch_norm: What becomes of running statistics: ``"average"``, ``"keep"`` or ``"recalibrate"``, see
            :class:`~lightning_odem.calibration.BatchNormStatistics`. Other buffers become the incoming model's.
        calibration: Further settings of the calibration, among them whether its loss reads labels.
        offload: Where the base and the merged model, the buffer and what tasks and method keep are between merges:
            ``"cpu"``, in main memory, or ``"disk"``, mapped from the files of the state, which costs memory only where
            they are used.
        evaluate: ``"every"`` measures every task seen after each merge, ``False`` nothing: scores are NaN then.
        keep_checkpoints: How many of the last merges' checkpoints ``merged-*.ckpt`` stay in the directory, at least 1;
            older ones are removed, and the report does not name them any more. None keeps all.

    Attributes:
        report: What was measured so far, a :class:`~lightning_odem.report.StreamReport`.
        calibration_data: Calibration datasets, or iterables of batches, by task name; they come before the
            datamodule's.
        evaluation_data: Dataloaders or datamodules to measure scores on, by task name; needed for tasks that
            another process has merged unless :meth:`remaining` was given them, otherwise the datamodule's test or
            validation data.
        last_merged_path: The checkpoint with the merged weights, or None.
        division: Which parameters are merged and which belong to single tasks.

    Raises:
        ValueError: For unknown names, weights that are no utilities, or a calibration size below 1.
        StreamStateError: If the state in ``dirpath`` cannot be read; a damaged newest one falls back to the one before.

    Example::

        merge = ContinualMergeCallback()
        for task in tasks:
            trainer = L.Trainer(max_epochs=3, callbacks=[merge])
            trainer.fit(model, datamodule=task)
        print(merge.table())

    A stream that a later process goes on with, next week or after a crash::

        L.seed_everything(0)
        model = ...  # with the weights of the base model
        merge = ContinualMergeCallback(dirpath="streams/shop")
        for task in merge.remaining(tasks):
            L.Trainer(max_epochs=3, callbacks=[merge]).fit(model, datamodule=task)
    """

    def __init__(
        self,
        method: str | MergeMethod = "ode",
        weights: dict[str, float] | list[float] | None = None,
        calibration_size: int = 1024,
        finetune_from: Literal["base", "merged"] = "base",
        exclude: Sequence[str] = (),
        dirpath: str | None = None,
        batch_norm: Literal["average", "keep", "recalibrate"] = "average",
        calibration: CalibrationOptions = CalibrationOptions(),
        offload: Literal["cpu", "disk"] = "cpu",
        evaluate: Literal["every", False] = "every",
        keep_checkpoints: int | None = 3,
    ) -> None:
        check_choice("finetune_from", finetune_from, FINETUNE_FROM)
        check_choice("batch_norm", batch_norm, POLICIES)
        check_choice("offload", offload, OFFLOADS)
        if not isinstance(evaluate, (str, bool)) or evaluate not in EVALUATE:
            raise ValueError(f"evaluate is 'every' (after each merge) or False, got {evaluate!r}.")
        check_instance("calibration", calibration, CalibrationOptions, "CalibrationOptions")
        if weights is not None:
            check_instance("weights", weights, (Mapping, list, tuple), "a list, or a dictionary by task name,")
            check_names("weights", list(weights) if isinstance(weights, Mapping) else ())
            check_weights(list(weights.values()) if isinstance(weights, Mapping) else weights)
        if dirpath is not None:
            check_path("dirpath", dirpath)
        self._stream = Stream(
            method,
            calibration_size=check_integer("calibration_size", calibration_size, 1),
            exclude=check_patterns("exclude", exclude) or (),
            batch_norm=batch_norm,
            calibration=calibration,
        )
        self.keep_checkpoints = keep_checkpoints
        if keep_checkpoints is not None:
            self.keep_checkpoints = check_integer("keep_checkpoints", keep_checkpoints, 1)
        self.weights = weights
        self.finetune_from = finetune_from
        self.division = self._stream.division
        self.batch_norm = batch_norm
        self.calibration = calibration
        self.calibration_data: dict[str, Iterable] = {}
        self.last_merged_path: str | None = None
        self._directory = RunDirectory(dirpath, mapped=offload == "disk")
        self._fresh_start = FreshStart()
        self._measurement = Measurement(self.division, enabled=bool(evaluate))
        self.evaluation_data = self._measurement.given
        self._stage: str | None = None  # of the Trainer's run that is going on
        self._fit = Fit()
        self._random = RandomStream()
        self._taken_up = False  # from the directory, and not fitted on yet
        self._put_in: Snapshot = {}  # merged weights that a module may still hold, before those of another process
        self._handed_out: dict[int, tuple[Any, str]] = {}  # names that remaining() gave datamodules
        if dirpath is not None and (stored := self._directory.load()) is not None:
            self._take_up(stored)

    @property
    def method(self) -> MergeMethod:
        """The merge method."""
        return self._stream.method

    @property
    def report(self) -> StreamReport:
        """What was measured so far."""
        return self._state.report

    @property
    def dirpath(self) -> Path | None:
        """Directory of checkpoints, report and figures; None before the first fit and under ``fast_dev_run``."""
        return self._directory.path

    def remaining(self, tasks: Iterable[_Data]) -> Iterator[_Data]:
        """Those of a stream's tasks that are not merged yet; the others' data serves to measure accuracies.

        A script that fits ``merge.remaining(tasks)`` can be started again, whatever ended it.

        The directory is read again before each task, so that tasks that another process has merged meanwhile are not
        given. A task given is merged under its name here, and refused if another process was faster.

        Args:
            tasks: Datamodules in the order of the stream. One without a ``task_name`` is called ``task_<number>``.
        """
        self._take_up_newer()
        self._directory.mend_report(self.report)
        for number, task in enumerate(tasks, start=1):
            self._take_up_newer()
            name = str(getattr(task, "task_name", f"task_{number}"))
            if name in self.report.tasks:
                self._measurement.remember(name, task)
            else:
                self._handed_out[id(task)] = (task, name)
                yield task

    def table(self, width: int | None = None) -> str:
        """The accuracy matrix with ACC and BWT, and the cost of each merge, as text."""
        return render_summary(self.report, width=width)

    def load_task(self, module: nn.Module, task: str) -> None:
        """Write the merged weights, and what ``task`` keeps for itself, into a module of the same architecture.

        Raises:
            ValueError: If the task is unknown, or names or shapes differ.
        """
        if task not in self.report.tasks:
            raise ValueError(f"Task {task!r} is not in the stream, which holds: {', '.join(self.report.tasks)}.")
        assert self._state.merged is not None, "there is a task, so there was a merge"
        restore_task_parameters(module, self._state.fixed | self._state.task_parameters[task])
        load_snapshot(module, self._state.merged, self.division.shared(module))

    def remove(self, task: str, model: Model) -> None:
        """Take a task out of the stream: the merged model is that of the other tasks, up to rounding.

        Nothing is trained and no samples are needed. The removal is written as a merge is, in one step; besides it the
        last generation of the state and older files of the directory still hold the task. :meth:`load_task` writes the
        merged weights into a module. Tasks merged later count as if the task had never been there; it may be merged
        again itself, under the same name, as :meth:`remaining` will have it.

        Nothing is measured: the report says which of its numbers are of models with the task. Batch-norm statistics
        are put right where they are averaged; kept or recalibrated ones stay. Method ``"ode"`` takes the last scale,
        without gradient flow, until the next merge.

        Args:
            task: Name of the task.
            model: The fine-tuned model that it was merged with, which the stream does not keep: a checkpoint as
                ``ModelCheckpoint`` writes it at the end of the training or another file of weights, a module, or
                tensors by name. Another model is refused where the stream knows the right one, see
                :func:`~lightning_odem.stream.removal.read_model`.

        Raises:
            ValueError: If there is no such task or no other one with a weight, if the method cannot take it out or has
                not merged the whole stream, or if the model is not the one that was merged.
            StreamInUseError: If another process fits a task of the stream.
            RuntimeError: In the middle of a fit, and in a job of several processes.
        """
        if self._stage == "fit":
            raise RuntimeError(f"Task {task!r} cannot be taken out of the stream while a task is fitted.")
        try:
            self._state = remove_task(self._directory, self._state, self.method, task, model)
            self.last_merged_path = self.report.merges[-1].checkpoint
            self._measurement.forget(task)
        finally:
            self._stream.load_method()

    def load_base(self, module: nn.Module) -> None:
        """Write the base model's weights into a module of the same architecture.

        A module that is built in ``configure_model`` or on the meta device has its parameters, or its shards of them,
        from ``on_fit_start`` on::

            def on_fit_start(self):  # of the module
                if merge.report.tasks:
                    merge.load_base(self)

        Raises:
            ValueError: If no task has been fitted yet, names or shapes differ, or the module is on the meta device.
        """
        if self._state.base is None:
            if self._directory.lacks_base:
                raise ValueError("The file of the base model is damaged; a fit of a module that holds it mends it.")
            raise ValueError("There is no base model yet: it is the module's weights when its first fit starts.")
        load_snapshot(module, self._state.base, self.division.shared(module))

    # ------------------------------------------------------------------------------------------- before the training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse Trainers that would lose the merge; let a Trainer that has trained before train again."""
        self._stage = stage
        if stage == "fit":
            self._fit = Fit()
            check_trainer(trainer, self)
            self._fresh_start.prepare(trainer)
            # A task broken off before; if it is resumed, the checkpoint brings it back.
            self._state.started = {}
            self._directory.lock(trainer)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._take_up_newer()
            self._random.before_fit(trainer.strategy)
            # Before the module's own setup, which may look at the heads there are or set them anew.
            if not self._taken_up or is_ready(
                pl_module, self._state.base or self._state.merged or {}, self._state.own_names
            ):
                self._go_on(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the stream where the module was not built before."""
        if self._fit.phase < Phase.PREPARED:
            self._go_on(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the base model on the first fit, go back to it on later ones, and draw the task's samples."""
        self._fit.phase = Phase.TRAINING
        with Processes.current().together():
            self._claim(trainer, pl_module)
            self._directory.check_room(trainer, pl_module, self._state)
            if self._stream.needs_samples:
                self.calibration.check(self._state.buffer)
            if not (self._fit.resumed and self._state.started):
                self._begin(trainer, pl_module)
            self._collect(trainer, pl_module)
            self._find_data(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first step, when heads are ready: check loss and predictions, measure the models at hand."""
        if self._fit.phase == Phase.MEASURED:
            return
        self._fit.phase = Phase.MEASURED
        state, measure = self._state, self._measurement.with_weights
        with Processes.current().together():
            self._check_loss(pl_module)
            if "pretrained" not in state.started:
                task = state.started["task"]
                state.started["before_training"] = measure(pl_module, state.merged, task)
                state.started["pretrained"] = measure(pl_module, state.base, task)
            tasks = [*self.report.tasks, state.started["task"]]
            self._measurement.check(pl_module, tasks, self.report.measured(), state.task_parameters)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The same where a training is resumed in the middle of an epoch, which does not start again."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample a stream of batches that cannot be drawn from by index; keep weights of the run if they are needed."""
        if self._fit.sampling is not None:
            self._fit.sampling.see(batch)
        if self._fit.collection is not None:
            self._fit.collection.see()

    # ---------------------------------------------------------------------------------------------- after the training

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge."""
        self.merge(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Catch up on a merge that an earlier process did not get to; say so if nothing was trained."""
        if self._fit.phase >= Phase.TRAINING:
            return
        if self._fit.resumed and self._state.started:
            with Processes.current().together():
                self._claim(trainer, pl_module)
                self._collect(trainer, pl_module)
                self._find_data(trainer)
            pl_module.to(trainer.strategy.root_device)
            finish_averages(trainer, pl_module)
            self.merge(trainer, pl_module)
            pl_module.cpu()  # where Lightning leaves a module after fit
            return
        rank_zero_warn(
            "trainer.fit trained nothing, so nothing was merged. Check max_epochs, max_steps and limit_train_batches; "
            "a resumed checkpoint may have been at the end of its training already."
        )

    def merge(self, trainer: L.Trainer, pl_module: L.LightningModule) -> MergeRecord:
        """Merge the module's weights into the stream, evaluate every task seen, and write the results.

        Called at the end of training. If anything fails the module holds the fine-tuned weights, which are saved, and
        the stream is what it was, in memory and on disk. An error in one of several processes is raised in all.
        """
        with Processes.current().together():
            return self._merge(trainer, pl_module)

    def _merge(self, trainer: L.Trainer, pl_module: L.LightningModule) -> MergeRecord:
        state = self._state
        task, weight, number = state.started["task"], state.started["weight"], len(self.report.tasks) + 1
        fit = self._fit
        buffer = fit.sampling.buffer() if fit.sampling is not None else None
        assert fit.collection is not None, "set up when the training started"
        trace = fit.collection.trace()
        _copy_from_main_process(trainer, pl_module)
        fine_tuned = self._measurement.current(pl_module, task)
        with (
            rescuing(trainer, self.dirpath, f"fine-tuned-{number:02d}-{file_name(task)}.ckpt"),
            progress(trainer, f"merging {task}") as on_step,
            self._stream.merging(
                pl_module, task, weight, buffer=buffer, trace=trace, on_step=on_step, fingerprint=True
            ) as addition,
        ):
            record = addition.record
            _copy_from_main_process(trainer, pl_module)
            scores = self._measurement.every_task(trainer, pl_module, addition.task_parameters)
            record.further = {name: score.further for name, score in scores.items() if score.further}
            record.checkpoint = self._directory.save_checkpoint(trainer, number, task)
            state = addition.state(
                accuracy=[score.value for score in scores.values()],
                metrics={name: score.metric for name, score in scores.items() if score.metric is not None},
                fine_tuned=fine_tuned,
                pretrained=state.started["pretrained"],
                before_training=state.started["before_training"],
            )
            state.random = self._random.after_merge(state.random)
            named = state.report
            if self.keep_checkpoints is not None:
                state.report = named.keeping_checkpoints(self.keep_checkpoints)
            self._directory.commit(trainer, pl_module, state)
        # From here on the stream has one task more.
        self._state = state
        self._directory.remove_checkpoints(trainer, named, state.report)
        fit.collection = fit.sampling = None
        release_averages(trainer)
        publish(trainer, self._directory, self.report)
        self.last_merged_path = record.checkpoint
        return record

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let other processes go on with the stream."""
        self._stage = None
        self._directory.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let other processes go on with the stream."""
        self._stage = None
        self._directory.release()

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The stream, as plain containers and tensors; in the middle of a task also the random state."""
        state = self._state.state_dict()
        return {**state, "random_now": take_random_state()} if self._state.started else state

    def __getstate__(self) -> dict[str, Any]:
        check_no_spawning()
        return vars(self)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put whole tensors into the checkpoint where processes share the parameters."""
        checkpoint["callbacks"][self.state_key].update(self._state.whole(pl_module).state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the stream of a checkpoint; evaluating an older checkpoint leaves a stream in progress alone."""
        if self._stage not in (None, "fit"):
            if state_dict["started"]:
                rank_zero_warn(
                    f"The checkpoint was saved while task {state_dict['started']['task']!r} was trained: it holds "
                    "fine-tuned, unmerged weights. For the merged model pass the model and no ckpt_path, or "
                    "ckpt_path=callback.last_merged_path."
                )
            if self.report.tasks:
                return
        self._state.load_state_dict(state_dict)
        self._stream.load_method()
        self._taken_up = False
        self._fit.resumed = self._stage == "fit"
        if self._fit.resumed and "random_now" in state_dict:
            load_random_state(state_dict["random_now"])

    # -------------------------------------------------------------------------------------------------------- details

    @property
    def _state(self) -> StreamState:
        return self._stream.state

    @_state.setter
    def _state(self, state: StreamState) -> None:
        self._stream.state = state

    def _take_up(self, stored: dict[str, Any]) -> None:
        """Go on with the stream that was found in the directory."""
        capacity = self._state.buffer.capacity
        self._state.load_state_dict(stored)
        self._stream.load_method()
        self.last_merged_path = self.report.merges[-1].checkpoint if self.report.merges else None
        if self.last_merged_path is not None:  # the directory may have been moved
            self.last_merged_path = str(Path(stored["dirpath"]) / Path(self.last_merged_path).name)
        self._taken_up = True
        if self._state.buffer.capacity != capacity:
            rank_zero_warn(
                f"The stream in {self._state.dirpath} keeps {self._state.buffer.capacity} calibration samples, and "
                f"goes on so; calibration_size={capacity} is not used."
            )

    def _take_up_newer(self) -> None:
        """Take up what another process has added to the stream since it was read."""
        if (newer := self._directory.newer(self._state)) is not None:
            self._put_in = self._state.merged or {}
            self._take_up(newer)

    def _claim(self, trainer: L.Trainer, module: nn.Module) -> None:
        newer = self._directory.claim(trainer, self._state, resumed=self._fit.resumed)
        if newer is not None:
            self._take_up(newer)
        self._state.cut(module)
        self._stream.load_method()

    def _go_on(self, module: nn.Module) -> None:
        """Put what the tasks keep for themselves into a new module, the last task's as they would be in the old one.

        Random numbers go on from there too: those that built the module were drawn as by the first process.
        """
        self._fit.phase = Phase.PREPARED
        self._state.random = self._random.before_task(self._state.random, self._taken_up)
        if self._taken_up and self.report.tasks:
            with isolate_rng():
                for own in (self._state.fixed, *self._state.task_parameters.values()):
                    restore_task_parameters(module, own)

    def _check_base(self, module: L.LightningModule) -> None:
        """Refuse a module that did not start from the base model of the stream found in the directory.

        Raises:
            ValueError: With the differences, and how to get the base model.
        """
        found = take_snapshot(module, self.division.shared(module))
        differing = differences(self._state.base or {}, found)
        left = (self._state.merged or {}, self._put_in)
        known = [{name: value.to(found[name]) for name, value in own.items() if name in found} for own in left]
        if differing and all(differences(own, found) for own in known):
            prints = [fingerprint(weights)[:12] for weights in (self._state.base or {}, found)]
            raise ValueError(
                f"The stream in {self._state.dirpath} has another base model than {type(module).__name__} "
                f"({'; '.join(differing)}; SHA-256 {prints[0]}... and {prints[1]}...). Start with the weights that the "
                "stream began with, which load_base(module) of the callback writes into a module, or choose another "
                "dirpath."
            )

    def _begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        state = self._state
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        task = next_task_name(datamodule, self.report.tasks, self._handed_out.get(id(datamodule), (None, None))[1])
        removed = [record.task for record in self.report.removed]
        weight = next_task_weight(self.weights, datamodule, self.report.tasks, task, removed)
        operating_time([*self.report.weights, weight])  # refuses what is no utility
        self.division.check(module)
        is_shared = self.division.shared(module)
        if self._directory.lacks_base and state.base is None:
            self._directory.mend_base(trainer, module, base := take_snapshot(module, is_shared))
            state.base = base
        if self._taken_up:
            self._check_base(module)
            self._taken_up, self._put_in = False, {}
        if state.base is None:
            state.base = take_snapshot(module, is_shared)
        else:
            merged = state.merged if self.finetune_from == "merged" else None
            load_snapshot(module, merged or state.base, is_shared)
        # The instance may have served another stream.
        self._stream.load_method()
        state.started = {"task": task, "weight": weight}

    def _collect(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        collection = self._fit.collection = Collection(
            trainer,
            module,
            self.method.needs,
            method=method_name(self.method),
            select=self.division.shared(module),
            state=self._state.started,
        )
        collection.check()

    def _find_data(self, trainer: L.Trainer) -> None:
        """Find out where the accuracy of the task started is measured, and draw its calibration samples."""
        task, weight = self._state.started["task"], self._state.started["weight"]
        named = str(getattr(trainer.datamodule, "task_name", task))  # type: ignore[attr-defined]
        if named != task:
            raise ValueError(
                f"The checkpoint was saved while task {task!r} was trained, but the datamodule is that of task "
                f"{named!r}. Resume with the datamodule of {task!r}, or fit {named!r} without ckpt_path."
            )
        # The user's setup() and dataloaders may draw random numbers, which is not to change the training.
        with isolate_rng():
            self._measurement.find_data(trainer, task)
            self._fit.sampling = None
            if self._stream.needs_samples:
                given = self.calibration_data.get(task)
                self._fit.sampling = Sampling(trainer, task, weight, self._state.buffer, given)
        self._measurement.warn_of_missing(self.report.tasks)

    def _check_loss(self, module: L.LightningModule) -> None:
        """Run the calibration loss on two samples of this task and of each earlier one.

        So a module without a loss, or one that cannot use what earlier tasks keep any more, is refused before training.
        """
        sampling = self._fit.sampling
        pair = sampling.pair() if sampling is not None else None
        if pair is not None:
            encode(pair.state_dict(), "calibration")  # refuses what could not be saved after the merge
            with undisturbed(module):
                vector = ParameterVector(module, self.division.patterns(module))
                calibration = self._stream.measured_on(module, pair)
                calibration.store_logits(self._state.started["task"])
                calibration.objective(vector).loss_and_grad(vector.read())
                counts = self._state.buffer.counts
                earlier = [next(self._state.buffer.micro_batches_of(name, 2)) for name, held in counts.items() if held]
                kept = self._stream.measured_on(module, self._state.buffer)
                kept.objective(vector).losses(vector.read(), earlier)


@torch.no_grad()
def _copy_from_main_process(trainer: L.Trainer, module: nn.Module) -> None:
    """Give every process the same module to the last bit.

    Each has batch-norm statistics of its own after the last step, and its kernels may round differently.
    """
    if trainer.world_size > 1:
        reshard(module)
        # Shards are each process's own.
        whole = [parameter for parameter in module.parameters() if local(parameter) is parameter]
        for tensor in (*whole, *module.buffers()):
            # Channels-last weights are not contiguous.
            tensor.copy_(Processes.current().broadcast_(tensor.contiguous()))

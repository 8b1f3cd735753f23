"""The callback: when things happen in a Trainer's life. What happens is in the other files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
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
from lightning_odem.callback.guards import check_no_spawning
from lightning_odem.callback.session import Session
from lightning_odem.callback.settings import Settings
from lightning_odem.methods import MergeMethod
from lightning_odem.parameters.frozen_base import keep_frozen_when_loading
from lightning_odem.parameters.snapshot import load_snapshot
from lightning_odem.report import MergeRecord, StreamReport, render_summary
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.measurement import Given, Measurement
from lightning_odem.stream.monitor import MODES, Monitor
from lightning_odem.stream.random_state import take_random_state
from lightning_odem.stream.removal import Model, remove_task
from lightning_odem.stream.restoration import restore_task_parameters
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.stream import Stream

_Data = TypeVar("_Data", bound=L.LightningDataModule)

OFFLOADS = ("cpu", "disk")


class ContinualMergeCallback(L.Callback):
    r"""Merges each fine-tuned model into one deployed model: one ``fit`` is one task.

    Every fit fine-tunes from the base model, the module's weights at the first fit. When a training ends, its model is
    merged with the share :math:`t_k = w_k / (w_1 + \dots + w_k)`, and the module holds the merged model. All tasks are
    measured; the numbers go to the loggers, :attr:`report` and ``dirpath``. See ``docs/guides``.

    Args:
        method: A merge method or its name in :data:`~lightning_odem.methods.METHODS`.
        weights: Utility weights by task name or in order; by default the datamodules' ``task_weight``, else 1.
        calibration_size: Samples kept of all tasks together; 1024 is the paper's.
        finetune_from: Weights that a training starts with: ``"base"``, ``"merged"`` or what the ``"module"`` holds.
        exclude: Patterns of parameters kept per task: globs over dotted names, or names of modules.
        growing: Patterns of parameters that may have further rows in later tasks.
        dirpath: Directory of the stream, continued if it is there; by default ``merge_runs/version_N``.
        batch_norm: What becomes of running statistics: ``"average"``, ``"keep"`` or ``"recalibrate"``.
        calibration: Further settings of the calibration.
        offload: Where models and samples are between merges, ``"cpu"`` or mapped from ``"disk"``.
        evaluate: After which merge all tasks are measured, and not only its own: ``"every"``, each n-th, or the
            ``"last"`` of :meth:`remaining`. ``False`` measures nothing.
        monitor: Logged value that is the score; by default ``task_metric(task)``, else accuracy.
        mode: ``"max"`` if a higher monitored value is better, else ``"min"``.
        merge_weights: ``"last"`` weights of a training, or its ``"best"`` by ``ModelCheckpoint``.
        evaluation_data: By task name, datamodules to measure on, or which of several dataloaders.
        keep_checkpoints: Number of the last ``merged-*.ckpt`` that stay; None keeps all.

    Raises:
        ValueError: For an argument out of range.
        StreamStateError: If the state in ``dirpath`` cannot be read.

    Example::

        merge = ContinualMergeCallback(dirpath="streams/shop")
        for task in merge.remaining(tasks):
            L.Trainer(max_epochs=3, callbacks=[merge]).fit(model, datamodule=task)
        print(merge.table())
    """

    def __init__(
        self,
        method: str | MergeMethod = "ode",
        weights: dict[str, float] | list[float] | None = None,
        calibration_size: int = 1024,
        finetune_from: Literal["base", "merged", "module"] = "base",
        exclude: Sequence[str] = (),
        growing: Sequence[str] = (),
        dirpath: str | None = None,
        batch_norm: Literal["average", "keep", "recalibrate"] = "average",
        calibration: CalibrationOptions = CalibrationOptions(),
        offload: Literal["cpu", "disk"] = "cpu",
        evaluate: Literal["every", "last", False] | int = "every",
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        merge_weights: Literal["last", "best"] = "last",
        evaluation_data: dict[str, L.LightningDataModule | int | str] | None = None,
        keep_checkpoints: int | None = 3,
    ) -> None:
        if keep_checkpoints is not None:
            keep_checkpoints = check_integer("keep_checkpoints", keep_checkpoints, 1)
        settings = Settings(weights, finetune_from, merge_weights, evaluate, keep_checkpoints)
        check_choice("batch_norm", batch_norm, POLICIES)
        check_choice("offload", offload, OFFLOADS)
        check_instance("calibration", calibration, CalibrationOptions, "CalibrationOptions")
        if evaluation_data is not None:
            check_instance("evaluation_data", evaluation_data, Mapping, "a dictionary by task name")
            check_names("evaluation_data", list(evaluation_data))
        if monitor is not None:
            check_instance("monitor", monitor, str, "the name of a logged value")
        check_choice("mode", mode, MODES)
        if dirpath is not None:
            check_path("dirpath", dirpath)
        self._stream = Stream(
            method,
            calibration_size=check_integer("calibration_size", calibration_size, 1),
            exclude=check_patterns("exclude", exclude) or (),
            growing=check_patterns("growing", growing) or (),
            batch_norm=batch_norm,
            calibration=calibration,
        )
        self.keep_checkpoints = keep_checkpoints
        self.weights = weights
        self.finetune_from = finetune_from
        self.division = self._stream.division
        self.batch_norm = batch_norm
        self.calibration = calibration
        self._directory = RunDirectory(dirpath, mapped=offload == "disk")
        self._measurement = Measurement(
            self.division,
            enabled=evaluate is not False,
            monitor=Monitor(monitor, mode) if monitor is not None else None,
        )
        self._measurement.given.update(evaluation_data or {})
        self._session = Session(self._stream, self._directory, self._measurement, settings)
        self._stage: str | None = None  # of the Trainer's run that is going on
        if dirpath is not None and (stored := self._directory.load()) is not None:
            self._session.take_up(stored)

    @property
    def method(self) -> MergeMethod:
        """The merge method."""
        return self._stream.method

    @property
    def report(self) -> StreamReport:
        """What was measured so far."""
        return self._state.report

    @property
    def calibration_data(self) -> dict[str, Iterable]:
        """Calibration datasets, or iterables of batches, by task name; they come before the datamodule's."""
        return self._session.calibration_data

    @calibration_data.setter
    def calibration_data(self, data: dict[str, Iterable]) -> None:
        self._session.calibration_data = data

    @property
    def evaluation_data(self) -> dict[str, Given]:
        """What scores are measured on, by task name: dataloaders, datamodules, or which of several loaders."""
        return self._measurement.given

    @evaluation_data.setter
    def evaluation_data(self, data: dict[str, Given]) -> None:
        self._measurement.given = data

    @property
    def last_merged_path(self) -> str | None:
        """The checkpoint with the merged weights, or None."""
        return self._session.last_merged_path

    @property
    def dirpath(self) -> Path | None:
        """Directory of checkpoints, report and figures; None before the first fit and under ``fast_dev_run``."""
        return self._directory.path

    def remaining(self, tasks: Iterable[_Data]) -> Iterator[_Data]:
        """The tasks of a stream that are not merged yet; the data of the others is used to measure accuracies.

        A script that fits ``merge.remaining(tasks)`` can be started again, whatever ended it.

        The directory is read again before each task, so that tasks that another process has merged meanwhile are not
        given. A task given is merged under its name here, and refused if another process was faster.

        Args:
            tasks: Datamodules in the order of the stream. One without a ``task_name`` is called ``task_<number>``.
        """
        return self._session.remaining(tasks)

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
        self._stream.check_fixed(module)
        restore_task_parameters(module, self._state.fixed | self._state.task_parameters[task])
        load_snapshot(module, self._state.merged, self.division.shared(module))

    def remove(self, task: str, model: Model) -> None:
        """Take a task out of the stream: the merged model is that of the other tasks, up to rounding.

        Nothing is trained and no samples are needed. The removal is written as a merge is, in one step; besides it the
        last generation of the state and older files of the directory still hold the task. :meth:`load_task` writes the
        merged weights into a module. Tasks merged later count as if the task had never been there. :meth:`remaining`
        gives the task again, and it may be merged again under the same name.

        Nothing is measured: the report says which of its numbers are of models with the task. Batch-norm statistics
        are put right where they are averaged; kept or recalibrated ones stay. Method ``"ode"`` takes the last scale,
        without gradient flow, until the next merge.

        Args:
            task: Name of the task.
            model: The fine-tuned model that it was merged with, which the stream does not keep: a checkpoint as
                ``ModelCheckpoint`` writes it at the end of the training or another file of weights, a module, or
                tensors by name. Another model is refused where the stream knows the right one, see
                :func:`~lightning_odem.stream.identity.read_model`.

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
            self._session.last_merged_path = self.report.merges[-1].checkpoint
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
        self._stream.check_fixed(module)
        load_snapshot(module, self._state.base, self.division.shared(module))

    # ------------------------------------------------------------------------------------------- before the training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would lose the merge, and put the weights in that the training starts with."""
        self._stage = stage
        keep_frozen_when_loading(pl_module, self._state.frozen)
        if stage == "fit":
            self._session.begin_fit(trainer, pl_module, self)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the stream where the module was not built before."""
        self._session.prepare(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the base model on the first fit, and draw the task's samples."""
        self._session.begin_task(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first step, when heads are ready: check loss and predictions, measure the models at hand."""
        self._session.check(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The same where a training is resumed in the middle of an epoch, which does not start again."""
        self._session.check(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample a stream of batches that cannot be drawn from by index; keep weights of the run if they are needed."""
        self._session.fit.see(batch)

    # ---------------------------------------------------------------------------------------------- after the training

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge."""
        self.merge(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Catch up on a merge that an earlier process did not get to; say so if nothing was trained."""
        self._session.catch_up(trainer, pl_module)

    def merge(self, trainer: L.Trainer, pl_module: L.LightningModule) -> MergeRecord:
        """Merge the module's weights into the stream, evaluate every task seen, and write the results.

        Called at the end of training. If anything fails the module holds the fine-tuned weights, which are saved, and
        the stream is what it was, in memory and on disk. An error in one of several processes is raised in all. After
        the fit, it merges a training whose merge has failed or was interrupted.

        Raises:
            RuntimeError: If there is no training to merge.
        """
        if self._stage == "fit":
            return self._session.merge(trainer, pl_module)
        return self._session.merge_late(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let other processes go on with the stream."""
        self._stage = None
        self._directory.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave a module whose fit was refused as it was, and let other processes go on with the stream."""
        self._stage = None
        self._session.abort(pl_module)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The stream, as plain containers and tensors; in the middle of a task also the random state."""
        state = self._state.state_dict()
        return {**state, "random_now": take_random_state()} if self._state.started else state

    def __getstate__(self) -> dict[str, Any]:
        check_no_spawning()
        return vars(self)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put whole tensors into the checkpoint, and the place of the calibration samples if they are on disk."""
        state = checkpoint["callbacks"][self.state_key]
        state.update(self._state.whole(pl_module).state_dict())
        if not self.calibration.in_checkpoints and (reference := self._directory.refer_to_samples()) is not None:
            state["buffer"] = {"reference": reference}

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
        if reference := state_dict["buffer"].get("reference"):
            state_dict = {**state_dict, "buffer": self._directory.read_samples(reference)}
        self._session.load_checkpoint(state_dict, fitting=self._stage == "fit")

    # -------------------------------------------------------------------------------------------------------- details

    @property
    def _state(self) -> StreamState:
        return self._stream.state

    @_state.setter
    def _state(self, state: StreamState) -> None:
        self._stream.state = state

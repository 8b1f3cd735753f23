"""One stream in this process, from fit to fit."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_odem.callback.best import find_ranking
from lightning_odem.callback.fit import Fit, Phase
from lightning_odem.callback.fit_merge import FitMerge
from lightning_odem.callback.guards import FreshStart, check_trainer, finish_averages
from lightning_odem.callback.roster import Roster
from lightning_odem.callback.settings import Settings
from lightning_odem.callback.start import StartWeights
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.measurement import Measurement
from lightning_odem.stream.random_state import RandomContinuation, load_random_state
from lightning_odem.stream.rehearsal import rehearse
from lightning_odem.stream.restoration import is_ready, restore_task_parameters
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.stream import Stream

_Data = TypeVar("_Data", bound=L.LightningDataModule)


class Session:
    """Takes a stream through the fits of Trainers: admission before a training, the merge after it.

    Args:
        stream: What merges.
        directory: Where the stream is kept.
        measurement: What measures scores.
        settings: The user's choices.
    """

    def __init__(self, stream: Stream, directory: RunDirectory, measurement: Measurement, settings: Settings) -> None:
        self.stream, self.directory, self.measurement, self.settings = stream, directory, measurement, settings
        self.last_merged_path: str | None = None
        self.calibration_data: dict[str, Iterable] = {}
        self.fit = Fit()
        self._fresh_start = FreshStart()
        self._start = StartWeights(stream, settings.finetune_from)
        self._random = RandomContinuation()
        self._taken_up = False  # from the directory, and not fitted on yet
        self._roster = Roster(settings.weights, settings.evaluate)
        self._fit_merge = FitMerge(stream, directory, measurement, settings, self._roster, self._random)

    @property
    def state(self) -> StreamState:
        """The state of the stream."""
        return self.stream.state

    @property
    def report(self) -> StreamReport:
        """What was measured so far."""
        return self.state.report

    # ------------------------------------------------------------------------------------------- between the trainings

    def take_up(self, stored: dict[str, Any]) -> None:
        """Go on with the stream that was found in the directory."""
        capacity = self.state.buffer.capacity
        self.state.load_state_dict(stored)
        self.stream.load_method()
        self.last_merged_path = self.report.merges[-1].checkpoint if self.report.merges else None
        if self.last_merged_path is not None:  # the directory may have been moved
            self.last_merged_path = str(Path(stored["dirpath"]) / Path(self.last_merged_path).name)
        self._taken_up = True
        if self.state.buffer.capacity != capacity:
            rank_zero_warn(
                f"The stream in {self.state.dirpath} keeps {self.state.buffer.capacity} calibration samples, and "
                f"goes on so; calibration_size={capacity} is not used."
            )

    def remaining(self, tasks: Iterable[_Data]) -> Iterator[_Data]:
        """Hand out the tasks that are not merged yet, and remember the data of the others."""
        self._take_up_newer()
        self.directory.mend_report(self.report)
        for name, task in self._roster.call(tasks):
            self._take_up_newer()
            if name in self.report.tasks:
                self.measurement.remember(name, task)
            else:
                yield task
        self.directory.finish_report(self.report)

    def load_checkpoint(self, state: dict[str, Any], fitting: bool) -> None:
        """Continue the stream of one of Lightning's checkpoints."""
        self.state.load_state_dict(state)
        self.stream.load_method()
        self._taken_up = False
        self.fit.resumed = fitting
        if fitting and "random_now" in state:
            load_random_state(state["random_now"])

    # -------------------------------------------------------------------------------------------- before the training

    def begin_fit(self, trainer: L.Trainer, module: L.LightningModule, callback: L.Callback) -> None:
        """Refuse Trainers that would lose the merge; let a Trainer that has trained before train again."""
        self.fit = Fit(settled=self.fit.settled)
        check_trainer(trainer, callback)
        if self.settings.merge_weights == "best":
            find_ranking(trainer)
        self._fresh_start.prepare(trainer)
        # A task broken off before; if it is resumed, the checkpoint brings it back.
        self.state.started = {}
        self.directory.lock(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._take_up_newer()
        self._random.before_fit(trainer.strategy)
        # Before the module's own setup, which may look at the heads there are or set them anew.
        is_whole = is_ready(module, self.state.base or self.state.merged or {}, self.state.own_names)
        if is_whole or not self._taken_up:
            self._go_on(module)
        self._start.reset()
        if is_whole:
            self._start.begin(module, is_new_process=self._taken_up, is_merged=self.fit.settled)

    def prepare(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Go on with the stream where the module was not built before, and refuse a task that has no name or weight."""
        if self.fit.phase < Phase.PREPARED:
            self._go_on(module)
        if not self.fit.resumed:
            self._roster.next(trainer, self.report)

    def begin_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take the base model on the first fit, go back to it on later ones, and draw the task's samples."""
        self.fit.phase = Phase.TRAINING
        with Processes.current().together():
            self._claim(trainer, module)
            self.directory.check_room(trainer, module, self.state)
            if self.stream.needs_samples:
                self.stream.calibration.check(self.state.buffer)
            if not (self.fit.resumed and self.state.started):
                self._begin(trainer, module)
            self.fit.collect(trainer, module, self.stream)
            self._find_data(trainer)
        self.fit.settled = False
        self._start.keep()

    def check(self, module: L.LightningModule) -> None:
        """Before the first step, when heads are ready: check loss and predictions, measure the models at hand."""
        if self.fit.phase == Phase.MEASURED:
            return
        self.fit.phase = Phase.MEASURED
        state, measure = self.state, self.measurement.with_weights
        with Processes.current().together():
            if self.fit.sampling is not None:
                rehearse(self.stream, module, self.fit.sampling)
            if "pretrained" not in state.started:
                task = state.started["task"]
                state.started["before_training"] = measure(module, state.merged, task)
                state.started["pretrained"] = measure(module, state.base, task)
            own = {**state.task_parameters, state.started["task"]: {}}
            due = own if self._roster.is_due(module.trainer, len(own)) else [state.started["task"]]
            self.measurement.check(module, due, self.report.measured, state.task_parameters)

    def abort(self, module: L.LightningModule) -> None:
        """Leave the module and the stream as they were before a fit that was refused, and let others use it."""
        self._start.take_back(module)
        self.directory.release()

    # ---------------------------------------------------------------------------------------------- after the training

    def catch_up(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Merge where an earlier process did not get to it; say so if nothing was trained."""
        if self.fit.phase >= Phase.TRAINING:
            return
        if self.fit.resumed and self.state.started:
            with Processes.current().together():
                self._claim(trainer, module)
                self.fit.collect(trainer, module, self.stream)
                self._find_data(trainer)
            module.to(trainer.strategy.root_device)
            finish_averages(trainer, module)
            self.merge(trainer, module)
            module.cpu()  # where Lightning leaves a module after fit
            return
        self._start.take_back(module)
        rank_zero_warn(
            "trainer.fit trained nothing, so nothing was merged. Check max_epochs, max_steps and limit_train_batches; "
            "a resumed checkpoint may have been at the end of its training already."
        )

    def merge(self, trainer: L.Trainer, module: L.LightningModule) -> MergeRecord:
        """Merge the module's weights, see :class:`~lightning_odem.callback.fit_merge.FitMerge`."""
        record = self._fit_merge.merge(trainer, module, self.fit)
        self.last_merged_path = record.checkpoint
        return record

    def merge_late(self, trainer: L.Trainer, module: L.LightningModule) -> MergeRecord:
        """Merge after the fit, where the merge at its end has failed.

        Raises:
            RuntimeError: If there is no training to merge.
        """
        if self.fit.collection is None:
            raise RuntimeError("There is no training to merge: the last one is merged, or none has begun.")
        self.directory.lock(trainer)
        module.to(trainer.strategy.root_device)
        try:
            return self.merge(trainer, module)
        finally:
            module.cpu()  # where Lightning leaves a module after fit
            self.directory.release()

    # -------------------------------------------------------------------------------------------------------- details

    def _take_up_newer(self) -> None:
        """Take up what another process has added to the stream since it was read."""
        if (newer := self.directory.newer(self.state)) is not None:
            self._start.left = self.state.merged or {}
            self.take_up(newer)

    def _claim(self, trainer: L.Trainer, module: nn.Module) -> None:
        newer = self.directory.claim(trainer, self.state, resumed=self.fit.resumed)
        if newer is not None:
            self.take_up(newer)
        self.state.cut(module)
        self.stream.load_method()

    def _go_on(self, module: L.LightningModule) -> None:
        """Put what the tasks keep for themselves into a new module, the last task's as they would be in the old one.

        Random numbers go on from there too: those that built the module were drawn as by the first process.
        """
        self.fit.phase = Phase.PREPARED
        self.state.random = self._random.before_task(self.state.random, self._taken_up)
        if self._taken_up and self.report.tasks:
            with isolate_rng():
                for own in (self.state.fixed, *self.state.task_parameters.values()):
                    restore_task_parameters(module, own)

    def _begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        started = self._roster.next(trainer, self.report)
        self.stream.check(module)
        if self.directory.lacks_base and self.state.base is None:
            base = take_snapshot(module, self.stream.division.shared(module))
            self.directory.mend_base(trainer, module, base)
            self.state.base = base
        self._start.complete(module, is_new_process=self._taken_up)
        self._taken_up = False
        # The instance may have served another stream.
        self.stream.load_method()
        self.state.started = started

    def _find_data(self, trainer: L.Trainer) -> None:
        """Find out where the accuracy of the task started is measured, and draw its calibration samples."""
        task = self.state.started["task"]
        named = str(getattr(trainer.datamodule, "task_name", task))  # type: ignore[attr-defined]
        if named != task:
            raise ValueError(
                f"The checkpoint was saved while task {task!r} was trained, but the datamodule is that of task "
                f"{named!r}. Resume with the datamodule of {task!r}, or fit {named!r} without ckpt_path."
            )
        # The user's setup() and dataloaders may draw random numbers, which is not to change the training.
        with isolate_rng():
            self.measurement.find_data(trainer, task)
            self.fit.sample(trainer, self.stream, self.calibration_data.get(task))
        self.measurement.warn_of_missing(self.report.tasks)

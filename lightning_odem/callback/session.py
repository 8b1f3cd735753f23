"""One stream in this process, from fit to fit."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_odem.calibration.sample_collector import SampleCollector
from lightning_odem.callback.best import find_ranking, hint_at_best, load_best
from lightning_odem.callback.fit import Fit, Phase
from lightning_odem.callback.guards import FreshStart, check_trainer, finish_averages, release_averages
from lightning_odem.callback.publication import publish
from lightning_odem.callback.rescue import rescuing
from lightning_odem.callback.start import StartWeights
from lightning_odem.flow import operating_time
from lightning_odem.methods import method_name
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.shards import local, reshard
from lightning_odem.parameters.snapshot import take_snapshot, undisturbed
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.report.progress import progress
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.measurement import Measurement
from lightning_odem.stream.naming import Weights, file_name, next_task_name, next_task_weight
from lightning_odem.stream.random_state import RandomContinuation, load_random_state
from lightning_odem.stream.restoration import is_ready, restore_task_parameters
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store import encode
from lightning_odem.stream.stream import Stream
from lightning_odem.stream.trace import Collection

_Data = TypeVar("_Data", bound=L.LightningDataModule)


@dataclass(frozen=True)
class Settings:
    """What a session is asked to do.

    Args:
        weights: Utility weights by task name or in the order of the tasks; None takes the datamodules'.
        finetune_from: ``"base"``, ``"merged"`` or ``"module"``: the weights that each training starts with.
        merge_weights: ``"last"`` or ``"best"``: the weights of a training that are merged.
        evaluate: ``"every"``, ``"last"``, a number n or False: after which merges all tasks are measured.
        keep_checkpoints: How many checkpoints of merged models stay; None keeps all.
    """

    weights: Weights
    finetune_from: str
    merge_weights: str
    evaluate: str | int | bool
    keep_checkpoints: int | None


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
        self._handed_out: dict[int, tuple[Any, str]] = {}  # names that remaining() gave datamodules
        self._last_task: Any = None  # the last one of remaining()
        self._settled = False  # whether the last fit has merged, so that the module held the merged model

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
        for number, (task, is_last) in enumerate(_with_last(tasks, self.settings.evaluate), start=1):
            self._take_up_newer()
            name = str(getattr(task, "task_name", f"task_{number}"))
            if name in self.report.tasks:
                self.measurement.remember(name, task)
            else:
                self._handed_out[id(task)] = (task, name)
                self._last_task = task if is_last else None
                yield task

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
        self.fit = Fit()
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
            self._start.begin(module, is_new_process=self._taken_up, is_merged=self._settled)

    def prepare(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Go on with the stream where the module was not built before, and refuse a task that has no name or weight."""
        if self.fit.phase < Phase.PREPARED:
            self._go_on(module)
        if not self.fit.resumed:
            self._next(trainer)

    def begin_task(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take the base model on the first fit, go back to it on later ones, and draw the task's samples."""
        self.fit.phase = Phase.TRAINING
        with Processes.current().together():
            self._claim(trainer, module)
            if self.stream.needs_samples:
                self.stream.calibration.check(self.state.buffer)
            if not (self.fit.resumed and self.state.started):
                self._begin(trainer, module)
            self._collect(trainer, module)
            self._find_data(trainer)
        self._settled = False
        self._start.keep()

    def check(self, module: L.LightningModule) -> None:
        """Before the first step, when heads are ready: check loss and predictions, measure the models at hand."""
        if self.fit.phase == Phase.MEASURED:
            return
        self.fit.phase = Phase.MEASURED
        state, measure = self.state, self.measurement.with_weights
        with Processes.current().together():
            self._check_loss(module)
            if "pretrained" not in state.started:
                task = state.started["task"]
                state.started["before_training"] = measure(module, state.merged, task)
                state.started["pretrained"] = measure(module, state.base, task)
            tasks = [*self.report.tasks, state.started["task"]]
            self.measurement.check(module, tasks, self.report.measured(), state.task_parameters)

    def abort(self, module: L.LightningModule) -> None:
        """Leave the module and the stream as they were before a fit that was refused; others may go on with it."""
        self._start.take_back(module)
        self.directory.release()

    def see(self, batch: Any) -> None:
        """Sample a stream of batches that cannot be drawn from by index; keep weights of the run if they are needed."""
        if self.fit.sampling is not None:
            self.fit.sampling.see(batch)
        if self.fit.collection is not None:
            self.fit.collection.see()

    # ---------------------------------------------------------------------------------------------- after the training

    def catch_up(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Merge where an earlier process did not get to it; say so if nothing was trained."""
        if self.fit.phase >= Phase.TRAINING:
            return
        if self.fit.resumed and self.state.started:
            with Processes.current().together():
                self._claim(trainer, module)
                self._collect(trainer, module)
                self._find_data(trainer)
            module.to(trainer.strategy.root_device)
            finish_averages(trainer, module)
            self.merge(trainer, module)
            module.cpu()  # where Lightning leaves a module after fit
            return
        rank_zero_warn(
            "trainer.fit trained nothing, so nothing was merged. Check max_epochs, max_steps and limit_train_batches; "
            "a resumed checkpoint may have been at the end of its training already."
        )

    def merge(self, trainer: L.Trainer, module: L.LightningModule) -> MergeRecord:
        """Merge the module's weights into the stream, evaluate, and write the results; all processes or none."""
        with Processes.current().together():
            return self._merge(trainer, module)

    def _merge(self, trainer: L.Trainer, module: L.LightningModule) -> MergeRecord:
        state, fit = self.state, self.fit
        is_last = self._last_task is not None and trainer.datamodule is self._last_task  # type: ignore[attr-defined]
        task, weight, number = state.started["task"], state.started["weight"], len(self.report.tasks) + 1
        buffer = fit.sampling.buffer() if fit.sampling is not None else None
        assert fit.collection is not None, "set up when the training started"
        trace = fit.collection.trace()
        epoch = None
        if self.settings.merge_weights == "best":
            epoch = load_best(trainer)
        else:
            hint_at_best(trainer)
        _copy_from_main_process(trainer, module)
        fine_tuned = self.measurement.current(module, task)
        with (
            rescuing(trainer, self.directory.path, f"fine-tuned-{number:02d}-{file_name(task)}.ckpt"),
            progress(trainer, f"merging {task}") as on_step,
            self.stream.merging(
                module, task, weight, buffer=buffer, trace=trace, on_step=on_step, fingerprint=True
            ) as addition,
        ):
            record = addition.record
            record.epoch = epoch
            _copy_from_main_process(trainer, module)
            tasks = (
                addition.task_parameters if self._is_due(number, is_last) else {task: addition.task_parameters[task]}
            )
            scores = self.measurement.every_task(trainer, module, tasks)
            record.further = {name: score.further for name, score in scores.items() if score.further}
            record.checkpoint = self.directory.save_checkpoint(trainer, number, task, state.frozen)
            state = addition.state(
                accuracy=[scores[name].value if name in scores else math.nan for name in addition.task_parameters],
                metrics={name: score.metric for name, score in scores.items() if score.metric is not None},
                fine_tuned=fine_tuned,
                pretrained=state.started["pretrained"],
                before_training=state.started["before_training"],
            )
            state.random = self._random.after_merge(state.random)
            named = state.report
            if self.settings.keep_checkpoints is not None:
                state.report = named.keeping_checkpoints(self.settings.keep_checkpoints)
            self.directory.commit(trainer, module, state)
        # From here on the stream has one task more.
        self.stream.state = state
        self.directory.remove_checkpoints(trainer, named, state.report)
        fit.collection = fit.sampling = None
        self._settled = True
        release_averages(trainer)
        publish(trainer, self.directory, self.report)
        self.last_merged_path = record.checkpoint
        return record

    def _is_due(self, number: int, is_last: bool) -> bool:
        """Whether all tasks are measured after a merge; otherwise only its own is."""
        every = self.settings.evaluate
        return every == "every" or is_last or (isinstance(every, int) and every > 0 and number % every == 0)

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

    def _next(self, trainer: L.Trainer) -> dict[str, Any]:
        """Name and weight of the task that a Trainer is about to fit.

        Raises:
            ValueError: If the name is taken, or the weight is missing or no utility.
        """
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        default = self._handed_out.get(id(datamodule), (None, None))[1]
        task = next_task_name(datamodule, self.report.tasks, default)
        removed = [record.task for record in self.report.removed]
        weight = next_task_weight(self.settings.weights, datamodule, self.report.tasks, task, removed)
        operating_time([*self.report.weights, weight])  # refuses what is no utility
        return {"task": task, "weight": weight}

    def _begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        started = self._next(trainer)
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

    def _collect(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        collection = self.fit.collection = Collection(
            trainer,
            module,
            self.stream.method.needs,
            method=method_name(self.stream.method),
            select=self.stream.division.shared(module),
            state=self.state.started,
        )
        collection.check()

    def _find_data(self, trainer: L.Trainer) -> None:
        """Find out where the accuracy of the task started is measured, and draw its calibration samples."""
        task, weight = self.state.started["task"], self.state.started["weight"]
        named = str(getattr(trainer.datamodule, "task_name", task))  # type: ignore[attr-defined]
        if named != task:
            raise ValueError(
                f"The checkpoint was saved while task {task!r} was trained, but the datamodule is that of task "
                f"{named!r}. Resume with the datamodule of {task!r}, or fit {named!r} without ckpt_path."
            )
        # The user's setup() and dataloaders may draw random numbers, which is not to change the training.
        with isolate_rng():
            self.measurement.find_data(trainer, task)
            self.fit.sampling = None
            if self.stream.needs_samples:
                given = self.calibration_data.get(task)
                self.fit.sampling = SampleCollector(trainer, task, weight, self.state.buffer, given)
        self.measurement.warn_of_missing(self.report.tasks)

    def _check_loss(self, module: L.LightningModule) -> None:
        """Run the calibration loss on two samples of this task and of each earlier one.

        So a module without a loss, or one that cannot use what earlier tasks keep any more, is refused before training.
        """
        sampling = self.fit.sampling
        pair = sampling.pair() if sampling is not None else None
        if pair is not None:
            encode(pair.state_dict(), "calibration")  # refuses what could not be saved after the merge
            with undisturbed(module):
                vector = ParameterVector(module, self.stream.division.patterns(module))
                calibration = self.stream.measured_on(module, pair)
                calibration.store_logits(self.state.started["task"])
                calibration.objective(vector).loss_and_grad(vector.read())
                counts = self.state.buffer.counts
                earlier = [next(self.state.buffer.micro_batches_of(name, 2)) for name, held in counts.items() if held]
                kept = self.stream.measured_on(module, self.state.buffer)
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


def _with_last(tasks: Iterable[_Data], evaluate: str | int | bool) -> Iterator[tuple[_Data, bool]]:
    """The tasks, each with whether it is the last one; looks one ahead only where that makes a difference."""
    ahead = iter(tasks)
    if evaluate == "every" or evaluate is False:
        yield from ((task, False) for task in ahead)
    elif (task := next(ahead, None)) is not None:
        for following in ahead:
            yield task, False
            task = following
        yield task, True

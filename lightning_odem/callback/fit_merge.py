"""The merge at the end of a training."""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_odem.callback.best import hint_at_best, load_best
from lightning_odem.callback.fit import Fit
from lightning_odem.callback.guards import release_averages
from lightning_odem.callback.publication import publish
from lightning_odem.callback.roster import Roster
from lightning_odem.callback.settings import Settings
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.shards import copy_from_first_process, weights_checkpoint
from lightning_odem.report import MergeRecord
from lightning_odem.report.progress import progress
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.measurement import Measurement
from lightning_odem.stream.naming import file_name
from lightning_odem.stream.random_state import RandomContinuation
from lightning_odem.stream.stream import Stream


class FitMerge:
    """Takes the model of a training that has ended into the stream, and shows the result.

    Args:
        stream: What merges.
        directory: Where the stream is kept.
        measurement: What measures scores.
        settings: The user's choices.
        roster: Tells when all tasks are measured.
        random: Random numbers, which go on from task to task.
    """

    def __init__(
        self,
        stream: Stream,
        directory: RunDirectory,
        measurement: Measurement,
        settings: Settings,
        roster: Roster,
        random: RandomContinuation,
    ) -> None:
        self._stream, self._directory, self._measurement, self._settings = stream, directory, measurement, settings
        self._roster, self._random = roster, random

    def merge(self, trainer: L.Trainer, module: L.LightningModule, fit: Fit) -> MergeRecord:
        """Merge the module's weights into the stream, evaluate, and write the results; all processes or none.

        If anything fails, the module holds the fine-tuned weights, which are saved, and the stream is what it was.
        """
        with Processes.current().together():
            return self._merge(trainer, module, fit)

    def _merge(self, trainer: L.Trainer, module: L.LightningModule, fit: Fit) -> MergeRecord:
        state = self._stream.state
        task, weight, number = state.started["task"], state.started["weight"], len(state.report.tasks) + 1
        buffer = fit.sampling.buffer() if fit.sampling is not None else None
        assert fit.collection is not None, "set up when the training started"
        trace = fit.collection.trace()
        with _rescuing(trainer, self._directory.path, f"fine-tuned-{number:02d}-{file_name(task)}.ckpt"):
            epoch = self._choose_weights(trainer)
            copy_from_first_process(module)
            started = time.perf_counter()
            fine_tuned = self._measurement.current(module, task)
            spent = time.perf_counter() - started
            with (
                progress(trainer, f"merging {task}") as on_step,
                self._stream.merging(
                    module, task, weight, buffer=buffer, trace=trace, on_step=on_step, fingerprint=True
                ) as addition,
            ):
                record = addition.record
                record.epoch = epoch
                copy_from_first_process(module)
                own = addition.task_parameters
                due = own if self._roster.is_due(trainer, number) else {task: own[task]}
                started = time.perf_counter()
                scores = self._measurement.every_task(trainer, module, due)
                record.evaluation_seconds = spent + time.perf_counter() - started
                record.further = {name: score.further for name, score in scores.items() if score.further}
                record.checkpoint = self._directory.save_checkpoint(trainer, number, task, state.frozen)
                state = addition.state(
                    accuracy=[scores[name].value if name in scores else math.nan for name in own],
                    metrics={name: score.metric for name, score in scores.items() if score.metric is not None},
                    fine_tuned=fine_tuned,
                    pretrained=state.started["pretrained"],
                    before_training=state.started["before_training"],
                )
                state.random = self._random.after_merge(state.random)
                named = state.report
                if self._settings.keep_checkpoints is not None:
                    state.report = named.keeping_checkpoints(self._settings.keep_checkpoints)
                self._directory.commit(trainer, module, state)
        # From here on the stream has one task more.
        self._stream.state = state
        self._directory.remove_checkpoints(trainer, named, state.report)
        fit.collection = fit.sampling = None
        fit.settled = True
        release_averages(trainer)
        publish(trainer, self._directory, state.report)
        return record

    def _choose_weights(self, trainer: L.Trainer) -> int | None:
        """Put the weights in the module that are to be merged; returns their epoch unless they are the last ones."""
        if self._settings.merge_weights == "best":
            return load_best(trainer)
        hint_at_best(trainer)
        return None


@contextmanager
def _rescuing(trainer: L.Trainer, directory: Path | None, name: str) -> Iterator[None]:
    """Save the module's weights if the block fails, in the first of three places that takes them, and say where.

    These are ``directory``, the Trainer's root directory and the system's directory for temporary files. Nothing is
    written under ``fast_dev_run``.

    Args:
        trainer: The Trainer; its module holds the fine-tuned weights again when the block has failed.
        directory: Directory of the stream, or None.
        name: Name of the file.
    """
    try:
        yield
    except BaseException as error:  # Ctrl-C too
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            places = [directory, Path(trainer.default_root_dir), Path(tempfile.gettempdir())]
            saved = _save(trainer, [place / name for place in places if place is not None])
            where = f"are saved in {saved}" if saved else "could not be saved anywhere; the module in memory holds them"
            rank_zero_warn(f"The merge failed with {type(error).__name__}. The fine-tuned weights {where}.")
        raise


def _save(trainer: L.Trainer, paths: list[Path]) -> Path | None:
    checkpoint = weights_checkpoint(trainer)  # by all processes together
    for path in paths if trainer.is_global_zero else []:
        try:
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
        except (OSError, RuntimeError):  # torch reports a full disk by the latter
            continue
        return path
    return None

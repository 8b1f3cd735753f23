"""What the callback knows of the fit that is going on."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_odem.calibration.sample_collector import SampleCollector
from lightning_odem.methods import method_name
from lightning_odem.report.progress import progress
from lightning_odem.stream.stream import Stream
from lightning_odem.stream.trace import Collection


class Phase(IntEnum):
    """How far a fit has come; each phase comes after those before it, and may be skipped if nothing is trained."""

    BEGUN = 0
    """The Trainer is one that can merge, and the directory is this process's."""
    PREPARED = 1
    """The module has what earlier tasks keep for themselves, and random numbers go on where they were."""
    TRAINING = 2
    """The module has the base model, and the task's samples are drawn or will be."""
    MEASURED = 3
    """Loss and predictions are checked, and the models at hand are measured: the first step may be taken."""


@dataclass
class Fit:
    """One fit, from ``setup`` until the next one's.

    Args:
        phase: How far it has come.
        resumed: Whether one of Lightning's checkpoints was loaded.
        settled: Whether the last fit that trained has merged, so that the module held the merged model at its end.
        sampling: The task's calibration samples, if a merge reads any.
        collection: What the method needs of the training.
    """

    phase: Phase = Phase.BEGUN
    resumed: bool = False
    settled: bool = False
    sampling: SampleCollector | None = None
    collection: Collection | None = None

    def collect(self, trainer: L.Trainer, module: L.LightningModule, stream: Stream) -> None:
        """Begin to collect what the method needs of the training.

        Raises:
            ValueError: If the training cannot give it.
        """
        self.collection = Collection(
            trainer,
            module,
            stream.method.needs,
            method=method_name(stream.method),
            select=stream.division.shared(module),
            state=stream.state.started,
        )
        self.collection.check()

    def sample(self, trainer: L.Trainer, stream: Stream, given: Any) -> None:
        """Draw calibration samples of the task if a merge reads any.

        Args:
            trainer: The Trainer that fits the task.
            stream: The stream, which names the task.
            given: Calibration data from the user, or None.
        """
        self.sampling = None
        if stream.needs_samples:
            task, weight = stream.state.started["task"], stream.state.started["weight"]
            with progress(trainer, f"samples of {task}") as on_item:
                self.sampling = SampleCollector(trainer, task, weight, stream.state.buffer, given, on_item)
            rank_zero_info(self.sampling.announcement)  # below the bar, not in its line

    def see(self, batch: Any) -> None:
        """Sample a stream of batches that cannot be drawn from by index; keep weights of the run if they are needed."""
        if self.sampling is not None:
            self.sampling.see(batch)
        if self.collection is not None:
            self.collection.see()

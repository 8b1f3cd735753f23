"""What the callback knows of the fit that is going on."""

from dataclasses import dataclass
from enum import IntEnum

from lightning_odem.calibration.sample_collector import SampleCollector
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
        sampling: The task's calibration samples, where the method looks at any.
        collection: What the method needs of the training.
    """

    phase: Phase = Phase.BEGUN
    resumed: bool = False
    sampling: SampleCollector | None = None
    collection: Collection | None = None

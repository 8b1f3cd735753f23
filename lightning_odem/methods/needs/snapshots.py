"""The need of weights from the training run."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_odem.methods.needs.need import Need
from lightning_odem.methods.needs.sources import Offer, Sources
from lightning_odem.methods.needs.trail import Trail
from lightning_odem.methods.needs.training_run import TrainingRun
from lightning_odem.parameters.snapshot import Snapshot, take_snapshot


class Snapshots(Need[Sequence[Tensor]]):
    """Weights [d] at evenly spaced steps of the incoming model's training, oldest first.

    The start and the end of the training are not among them. The length of a run is not known beforehand, so there may
    be as few as half the requested number, less one.

    Args:
        count: Largest number of weights to keep, 2 or more.
    """

    source = "weights from the training run (which a run of one step does not have)"

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def check(self, run: TrainingRun) -> None:
        """Refuse a number that is too small.

        Raises:
            ValueError: If it is below 2; a short run could then end without any weights.
        """
        Trail(self.count)

    def see(self, run: TrainingRun, kept: dict[str, Any]) -> None:
        """Keep the weights if they are due."""
        Trail(self.count, kept).see(run.trainer.global_step, lambda: take_snapshot(run.module, run.select))

    def collect(self, run: TrainingRun, kept: dict[str, Any]) -> tuple[Snapshot, ...]:
        """The weights kept before the last step, by name of the parameter."""
        return Trail(self.count, kept).before(run.trainer.global_step)

    def is_met(self, offer: Offer) -> bool:
        """Whether a training left some."""
        return bool(offer.collected.get(type(self)))

    def build(self, sources: Sources) -> Sequence[Tensor]:
        """Each set of weights as a vector."""
        return [sources.vector.gather(snapshot) for snapshot in sources.collected[type(self)]]

    def join(self, other: Need[Sequence[Tensor]]) -> "Snapshots":
        """The need with the larger number."""
        return max(self, other, key=lambda need: need.count)  # type: ignore[attr-defined, return-value]

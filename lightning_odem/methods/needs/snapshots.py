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
    """Weights [d] at evenly spaced steps of the incoming model's training, the oldest first.

    Neither its start nor its end is among them. The length of a run is not known beforehand, so there may be half as
    many less one as were asked for.

    Args:
        count: Weights to keep at most, 2 or more.
    """

    source = "weights from the training run (which a run of one step does not have)"

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def check(self, run: TrainingRun) -> None:
        """Refuse too small a number.

        Raises:
            ValueError: If it is below 2, with which a short run could end without any.
        """
        Trail(self.count)

    def see(self, run: TrainingRun, kept: dict[str, Any]) -> None:
        """Keep the weights if it is time."""
        Trail(self.count, kept).see(run.trainer.global_step, lambda: take_snapshot(run.module, run.select))

    def collect(self, run: TrainingRun, kept: dict[str, Any]) -> tuple[Snapshot, ...]:
        """Those kept before the last step, by name of the parameter."""
        return Trail(self.count, kept).before(run.trainer.global_step)

    def is_met(self, offer: Offer) -> bool:
        """Where a training left some."""
        return bool(offer.collected.get(type(self)))

    def build(self, sources: Sources) -> Sequence[Tensor]:
        """Each as a vector."""
        return [sources.vector.gather(snapshot) for snapshot in sources.collected[type(self)]]

    def join(self, other: Need[Sequence[Tensor]]) -> "Snapshots":
        """The larger number."""
        return max(self, other, key=lambda need: need.count)  # type: ignore[attr-defined, return-value]

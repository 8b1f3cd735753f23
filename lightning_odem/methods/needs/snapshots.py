"""The need of weights from the training run."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_odem.methods.needs.need import Need
from lightning_odem.methods.needs.sources import Offer, Sources, TrainingRun
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


class Trail:
    """At most ``capacity`` snapshots of a run of unknown length, always evenly spaced in steps.

    A snapshot is taken every ``stride`` steps. When there are too many, every second one is dropped and the stride
    doubles.

    Args:
        capacity: Number of snapshots kept, at least 2.
        state: The dict that holds them, as an earlier trail left it; empty for a new run.

    Raises:
        ValueError: For a smaller capacity; a short run could then end without any snapshot.

    Example:
        >>> import torch
        >>> trail = Trail(capacity=4)
        >>> for step in range(1, 20):
        ...     trail.see(step, lambda: {"weight": torch.tensor(float(step))})
        >>> [float(snapshot["weight"]) for snapshot in trail.before(20)]
        [4.0, 8.0, 12.0, 16.0]
    """

    def __init__(self, capacity: int, state: dict[str, Any] | None = None) -> None:
        if capacity < 2:
            raise ValueError(f"A merge method that needs snapshots has to ask for at least 2, got {capacity}.")
        self.capacity = capacity
        self.state: dict[str, Any] = {} if state is None else state
        self.state.setdefault("stride", 1)
        self.state.setdefault("snapshots", {})

    def see(self, step: int, take: Callable[[], Snapshot]) -> None:
        """Take a snapshot of the weights after optimizer step ``step`` if one is due."""
        snapshots = self.state["snapshots"]
        if step == 0 or step % self.state["stride"] or step in snapshots:
            return
        if len(snapshots) == self.capacity:
            self.state["stride"] *= 2
            snapshots = {old: kept for old, kept in snapshots.items() if old % self.state["stride"] == 0}
        if step % self.state["stride"] == 0:
            snapshots = {**snapshots, step: take()}
        # Replaced, not changed: a checkpoint that is being written may hold the old one.
        self.state["snapshots"] = snapshots

    def before(self, step: int) -> tuple[Snapshot, ...]:
        """The snapshots of earlier steps, oldest first."""
        return tuple(kept for at, kept in self.state["snapshots"].items() if at < step)

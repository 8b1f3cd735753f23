"""Snapshots of a training run of unknown length."""

from collections.abc import Callable
from typing import Any

from lightning_odem.parameters.snapshot import Snapshot


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

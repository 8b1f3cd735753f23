"""The state that a stream keeps from one task to the next."""

import operator
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.parameters.divided_state import gather_state
from lightning_odem.parameters.snapshot import Snapshot, cut_snapshot, whole_snapshot
from lightning_odem.report.record import StreamReport


def _later() -> Any:
    """A field that states of earlier versions lack; it is empty for them."""
    return field(default_factory=dict, metadata={"later": True})


@dataclass
class StreamState:
    """The state of a stream of tasks; everything else can be derived from it or belongs to the user.

    A new field is one line here. Checkpoints, the directory, memory mapping and sharding go through all fields and
    treat every snapshot that they find. Processes that share a model may hold different parts of the method's state.

    Args:
        buffer: Calibration samples of the merged tasks.
        base: Parameters and buffers of the base model, except task-specific ones; None before the first fit.
        merged: Parameters and buffers of the merged model, likewise; None before the first merge.
        task_parameters: The excluded, trainable parameters of each task, as its training left them.
        fixed: Excluded parameters that are frozen, such as heads that are probes of the base model.
        report: The report of the merges and scores.
        method: State of the merge method.
        dirpath: Directory that the stream writes to; None before the first fit has chosen it.
        started: The task in training, with ``task``, ``weight`` and the accuracies measured before its training. Empty
            between tasks.
        random: ``state`` is the random state after the last merge, ``began`` the digest of that in which the stream's
            first process began. ``reseeded`` tells whether numbers were drawn between two tasks.
        names: Names of the merged tensors: ``parameters``, frozen ones too, and ``statistics`` of batch norm if they
            are averaged. Empty in states of earlier versions.
        settings: Name and arguments of the method of the last merge, see
            :func:`~lightning_odem.methods.describe.describe_method`. Empty in states of earlier versions.
        fingerprints: Fingerprint of the merged parameters of each task's fine-tuned model, as far as it is known.
        rows: Number of rows of each grown parameter that are merged, see :func:`~lightning_odem.stream.growth.grow`.
        adapters: The pairs of low-rank factors, by the name of the first factor, each as
            :meth:`~lightning_odem.parameters.low_rank.FactorPair.plain`.
        frozen: Fingerprints of the frozen base under adapters, which ``base`` and ``merged`` lack.
        layout: What the last merge knew of the module besides names: ``trained``, names of the parameters in the flat
            vector, and ``groups`` and ``transposed`` of :class:`~lightning_odem.methods.MergeContext`. Empty in states
            of earlier versions.
        measured: What was measured once and is kept: ``batch_size``, the size of the micro-batches that
            ``batch_size="auto"`` found.
    """

    buffer: CalibrationBuffer
    base: Snapshot | None = None
    merged: Snapshot | None = None
    task_parameters: dict[str, Snapshot] = field(default_factory=dict)
    fixed: Snapshot = _later()
    report: StreamReport = field(default_factory=StreamReport)
    method: dict[str, Any] = field(default_factory=dict)
    dirpath: str | None = None
    started: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = _later()
    names: dict[str, list[str]] = _later()
    settings: dict[str, Any] = _later()
    fingerprints: dict[str, str] = _later()
    rows: dict[str, int] = _later()
    adapters: dict[str, list[Any]] = _later()
    frozen: dict[str, str] = _later()
    layout: dict[str, Any] = _later()
    measured: dict[str, int] = _later()

    @property
    def own_names(self) -> set[str]:
        """Names of all parameters that are not merged."""
        return set(self.fixed).union(*self.task_parameters.values())

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain containers, so that checkpoints load with ``weights_only=True``."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        changing = {
            "started": dict(self.started),
            "buffer": self.buffer.state_dict(),
            "report": self.report.stored(),
        }
        return {"version": 2, **plain, **changing}

    def whole(self, module: nn.Module) -> "StreamState":
        """The state with whole tensors in the first process, if the module's parameters are sharded."""
        method = gather_state(module, self.merged or (), self.method)
        return replace(self, **self._with_snapshots(partial(whole_snapshot, module)), method=method)

    def cut(self, module: nn.Module) -> None:
        """Keep only this process's shards, if the module's parameters are sharded.

        The method's state stays whole until the next merge, which knows what the method needs of it.
        """
        vars(self).update(self._with_snapshots(partial(cut_snapshot, module)))

    def map(self, section: Callable[[str], Any]) -> None:
        """Replace entries that hold tensors by those on disk; ``section`` gives a saved entry by its name."""
        for name in _PLAIN:
            setattr(self, name, section(name))
        self.buffer.load_state_dict(section("buffer"))

    def _with_snapshots(self, change: Callable[[Snapshot], Snapshot]) -> dict[str, Any]:
        others = (entry.name for entry in fields(self) if entry.name != "method")
        return {name: _changed(getattr(self, name), change) for name in others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state by that of a :meth:`state_dict`.

        Raises:
            ValueError: If a newer version of the package wrote it.
        """
        if state["version"] not in (1, 2):
            raise ValueError(f"The stream's state has version {state['version']}; this package reads 1 and 2.")
        lacking: dict[str, Any] = {entry.name: {} for entry in fields(self) if entry.metadata.get("later")}
        for name in _PLAIN:
            setattr(self, name, {**lacking, **state}[name])
        self.started = dict(state["started"])
        self.buffer.load_state_dict(state["buffer"])
        self.report = StreamReport.from_dict(deepcopy(state["report"]))


# Fields that are replaced as a whole, never changed in place.
_PLAIN = tuple(entry.name for entry in fields(StreamState) if entry.name not in ("buffer", "report", "started"))


def _changed(value: Any, change: Callable[[Snapshot], Snapshot]) -> Any:
    """A value with every snapshot in its dicts changed, at any depth.

    If none changes, the result is the same object, by which saved values are recognised.
    """
    if not isinstance(value, dict) or not value:
        return value
    if all(isinstance(tensor, Tensor) for tensor in value.values()):
        return change(value)
    changed = {name: _changed(inner, change) for name, inner in value.items()}
    return value if all(map(operator.is_, changed.values(), value.values())) else changed

"""What the sections of a stream's state on disk have to hold, beyond what a checksum tells."""

import random
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_odem.arguments import shown
from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.report import MergeRecord, StreamReport


def check_sections(state: dict[str, Any]) -> None:
    """Check that a state that was read can be taken up.

    A file with a right checksum can still hold something else: another program, or another version, may have written
    it.

    Raises:
        ValueError: With the first section that is missing or of another kind than was written, and what is wrong.
    """
    lacking = [name for name in _CHECKS if name not in state and name not in _LATER]
    if lacking:
        raise ValueError(f"section {lacking[0]!r} is missing")
    for name, check in _CHECKS.items():
        if name in state:
            try:
                check(state[name])
            except _Wrong as wrong:
                raise ValueError(f"section {name!r} {wrong}") from None
            except Exception as error:  # whatever taking it up raises
                raise ValueError(f"section {name!r} cannot be taken up: {error!r}") from error
    if state["report"]["tasks"] and not isinstance(state["merged"], dict):
        raise ValueError("section 'merged' is empty, though tasks were merged")


class _Wrong(Exception):
    """A section that is not what it should be."""


def _of(kind: type | tuple[type, ...], what: str) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not isinstance(value, kind):
            raise _Wrong(f"is not {what} but {shown(value)}")

    return check


def _dictionary(check_entry: Callable[[Any], None]) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        _of(dict, "a dictionary by name")(value)
        for name, entry in value.items():
            if not isinstance(name, str):
                raise _Wrong(f"has the name {shown(name)}")
            try:
                check_entry(entry)
            except _Wrong as wrong:
                raise _Wrong(f"is wrong: {name!r} {wrong}") from None

    return check


def _or_none(check: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda value: None if value is None else check(value)


def _check_names(value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _Wrong(f"is not a list of names but {shown(value)}")


def _check_report(value: Any) -> None:
    _of(dict, "a report")(value)
    report = StreamReport.from_dict(value)
    _check_names(report.tasks)
    count = len(report.tasks)
    for name in ("weights", "pretrained", "fine_tuned", "before_training"):
        _check_numbers(name, getattr(report, name), count)
    if len(report.accuracy) != count or len(set(report.tasks)) != count or len(report.merges) != count:
        raise _Wrong(f"has {count} tasks, {len(report.accuracy)} rows of accuracies and {len(report.merges)} merges")
    for size, row in enumerate(report.accuracy, start=1):
        _check_numbers("accuracy", row, size)
    for record in report.merges:
        for entry in fields(MergeRecord):
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            kinds: Any = {"task": str, "t": (int, float), "method": str, "checkpoint": (str, type(None))}.get(
                entry.name, (int, float) if isinstance(default, (int, float)) else type(default)
            )
            if not isinstance(found := getattr(record, entry.name), kinds):
                raise _Wrong(f"has a merge with {entry.name}={shown(found)}")


def _check_numbers(name: str, values: Any, count: int) -> None:
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, (int, float)) for v in values):
        raise _Wrong(f"has {name} that are not {count} numbers but {shown(values)}")


def _check_started(value: Any) -> None:
    _of(dict, "a dictionary")(value)
    if value and not (isinstance(value.get("task"), str) and isinstance(value.get("weight"), (int, float))):
        raise _Wrong(f"names no task that was begun but {shown(value)}")


def _check_buffer(value: Any) -> None:
    held = {**value, "tasks": dict(value["tasks"])}
    CalibrationBuffer(held["capacity"], held["quota"], held["seed"])
    buffer = CalibrationBuffer()
    buffer.load_state_dict(held)
    _ = buffer.counts, buffer.shares()


def _check_random(value: Any) -> None:
    """Try the state on generators of their own."""
    _of(dict, "a dictionary")(value)
    if not value:
        return
    _of(str, "a digest")(value["began"])
    _of(bool, "a flag")(value["reseeded"])
    (version, words, gauss), (algorithm, keys, *rest) = value["state"]["python"], value["state"]["numpy"]
    random.Random().setstate((version, tuple(words.tolist()), gauss))
    np.random.RandomState().set_state((algorithm, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.Generator().set_state(value["state"]["torch"])
    _of(list, "a list of states of GPUs")(value["state"]["cuda"])


def _check_layout(value: Any) -> None:
    _of(dict, "a dictionary")(value)
    if value:
        _check_names(value["trained"])
        _check_names(value["transposed"])
        _dictionary(_of(int, "a number of groups"))(value["groups"])


_check_snapshot = _dictionary(_of(Tensor, "a tensor"))
_CHECKS: dict[str, Callable[[Any], None]] = {
    "version": _of(int, "a number"),
    "base": _or_none(_check_snapshot),
    "merged": _or_none(_check_snapshot),
    "task_parameters": _dictionary(_check_snapshot),
    "fixed": _check_snapshot,
    "report": _check_report,
    "method": _of(dict, "a dictionary"),
    "dirpath": _or_none(_of(str, "a path")),
    "started": _check_started,
    "buffer": _check_buffer,
    "random": _check_random,
    "names": _dictionary(_check_names),
    "settings": _of(dict, "a dictionary"),
    "fingerprints": _dictionary(_of(str, "a hash")),
    "layout": _check_layout,
    "measured": _dictionary(_of(int, "a number")),
}
# States of earlier versions lack these.
_LATER = ("fixed", "random", "names", "settings", "fingerprints", "layout", "measured")

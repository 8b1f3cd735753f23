"""Flat arguments of the paper's flow, as until version 0.6. This module will be removed with version 0.8."""

import warnings
from typing import TYPE_CHECKING

from lightning_odem.arguments import check_integer, check_range, check_seed
from lightning_odem.flow import ReusedGradient, Solver, StepControl
from lightning_odem.methods.operating_times import OperatingTime, SearchedTime
from lightning_odem.methods.sampling import Minibatches

if TYPE_CHECKING:
    Composed = tuple[Solver | str, OperatingTime | str | float, Minibatches | None, StepControl | bool | None]


def composed(
    solver: Solver | str,
    operating_time: OperatingTime | str | float,
    minibatches: Minibatches | None,
    step_control: StepControl | bool | None,
    search_to: float | None,
    holdout: float | None,
    batch_size: int | None,
    reuse: int | None,
    seed: int | None,
) -> "Composed":
    """Put flat arguments of :class:`~lightning_odem.PaperODEMerge` into objects, and warn with the new spelling.

    Raises:
        ValueError: For a number outside its range.
    """
    parts = []
    if reuse is not None:
        check_integer("reuse", reuse, 1)
        if reuse > 1:
            solver = ReusedGradient(solver, reuse)
            parts.append(f"solver={solver!r}")
    if search_to is not None:
        check_range("search_to", search_to, 1)
    if seed is not None:
        check_seed("seed", seed)
    if search_to is not None or holdout is not None:
        given = {"factor": search_to, "holdout": holdout}
        searched = SearchedTime(**{name: value for name, value in given.items() if value is not None})
        if operating_time == "search":
            operating_time = searched
            parts.append(f"operating_time={searched!r}")
    if batch_size is not None:
        check_integer("batch_size", batch_size, 1)
        minibatches = Minibatches(batch_size, seed or 0)
        parts.append(f"minibatches={minibatches!r}")
    if step_control is True:
        step_control = StepControl()
        parts.append("step_control=StepControl()")
    warnings.warn(
        "The arguments search_to, holdout, batch_size, reuse, seed and step_control=True of PaperODEMerge go with "
        f"version 0.8; write: PaperODEMerge({', '.join(parts)})",
        DeprecationWarning,
        stacklevel=4,
    )
    return solver, operating_time, minibatches, step_control

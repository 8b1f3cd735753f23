"""The streams that a study merges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WEIGHTINGS = ("uniform", "dirichlet")


@dataclass(frozen=True)
class StreamPlan:
    """One stream of fine-tuned models that every method merges.

    Args:
        seed: Seed of fine-tuning and of the calibration samples.
        order: 0-based index of the task order.
        weighting: ``"uniform"`` or ``"dirichlet"``.
        calibration_size: Samples kept of all tasks together.
        tasks: Names of the tasks in order.
        weights: Utility weights of the tasks in this order, with mean 1.
    """

    seed: int
    order: int
    weighting: str
    calibration_size: int
    tasks: tuple[str, ...]
    weights: tuple[float, ...]


def plan_streams(
    tasks: Sequence[str],
    *,
    orders: int,
    weighting: Sequence[str],
    concentration: float,
    seeds: Sequence[int],
    calibration_sizes: Sequence[int],
) -> list[StreamPlan]:
    """Plan a stream for every combination of seeds, calibration sizes, orders and weightings.

    Order 0 is that of the stream. The other orders are random permutations, which all differ and are the same for every
    seed of fine-tuning. Utility weights of the weighting ``"dirichlet"`` are drawn once for every order, from the
    symmetric Dirichlet distribution with ``concentration`` per task. A weight belongs to a task, not to a place in the
    order.

    Raises:
        ValueError: For no order, seed or size, fewer samples than tasks, more orders than the tasks have permutations,
            a concentration that is not positive, or an unknown weighting.

    Example:
        >>> options = {"concentration": 1.0, "seeds": [0], "calibration_sizes": [64]}
        >>> plans = plan_streams(["a", "b"], orders=1, weighting=["uniform", "dirichlet"], **options)
        >>> [(plan.weighting, plan.tasks, round(sum(plan.weights), 6)) for plan in plans]
        [('uniform', ('a', 'b'), 2.0), ('dirichlet', ('a', 'b'), 2.0)]
    """
    unknown = [name for name in weighting if name not in WEIGHTINGS]
    if unknown:
        raise ValueError(f"Unknown weighting {unknown}; there are {', '.join(WEIGHTINGS)}.")
    if orders < 1 or not weighting or not seeds or not calibration_sizes:
        raise ValueError(
            "A comparison needs at least one order, weighting, seed and calibration size, got "
            f"orders={orders}, weighting={list(weighting)}, seeds={list(seeds)}, sizes={list(calibration_sizes)}."
        )
    if min(calibration_sizes) < len(tasks):
        raise ValueError(
            f"{min(calibration_sizes)} calibration samples are too few for {len(tasks)} tasks; each task needs one."
        )
    if concentration <= 0.0:
        raise ValueError(f"The concentration of a Dirichlet distribution must be positive, got {concentration}.")
    sequences = _orders(tasks, orders)
    return [
        StreamPlan(
            seed, order, kind, size, sequences[order], _weights(tasks, sequences[order], order, kind, concentration)
        )
        for seed in seeds
        for size in calibration_sizes
        for order in range(orders)
        for kind in weighting
    ]


def _orders(tasks: Sequence[str], number: int) -> list[tuple[str, ...]]:
    if number > math.factorial(len(tasks)):
        raise ValueError(f"{len(tasks)} tasks have {math.factorial(len(tasks))} orders, fewer than orders={number}.")
    found = {tuple(tasks): None}
    generator = np.random.default_rng(0)
    while len(found) < number:
        found[tuple(tasks[index] for index in generator.permutation(len(tasks)))] = None
    return list(found)


def _weights(
    tasks: Sequence[str], sequence: Sequence[str], order: int, weighting: str, concentration: float
) -> tuple[float, ...]:
    if weighting == "uniform":
        return (1.0,) * len(tasks)
    drawn = len(tasks) * np.random.default_rng(order).dirichlet([concentration] * len(tasks))
    by_task = dict(zip(tasks, drawn.tolist(), strict=True))
    return tuple(by_task[task] for task in sequence)

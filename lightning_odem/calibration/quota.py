"""How many of the buffer's places each task gets, and which of its samples are kept first."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_odem.flow.largest import largest

_ROUNDING = 1e-9


def allocate(capacity: int, shares: Sequence[float], available: Sequence[int]) -> list[int]:
    """Divide ``capacity`` places in proportion to ``shares``; no task gets more places than it has samples.

    With equal shares and enough samples, each of k tasks gets floor(N / k) places or one more, the earlier tasks first,
    so that the sum is N. No task gets more places when another one joins. With unequal shares, rounding may add one
    then. Places that a task cannot fill go to the others. Places that are left by rounding down go to the largest
    remainders. Of equal remainders, the earlier task's comes first. Remainders are equal if they differ by less than a
    billionth of a place.

    Args:
        capacity: Places in all, N.
        shares: Non-negative share of each task, at least one positive.
        available: Number of samples of each task.

    Returns:
        Places per task. Their sum is N, or the number of all samples of tasks with a positive share if that is less.

    Example:
        >>> allocate(10, [1, 1, 1], [100, 100, 100])
        [4, 3, 3]
        >>> allocate(10, [1, 1, 1], [100, 2, 100])
        [4, 2, 4]
        >>> allocate(10, [3, 1], [100, 100]), allocate(10, [1e308, 1e308], [9, 9])
        ([8, 2], [5, 5])
    """
    if math.isinf(sum(shares)):  # finite shares; divided by the largest, they have a finite sum
        shares = [share / max(shares) for share in shares]
    places = [0] * len(shares)
    open_tasks = [task for task, share in enumerate(shares) if share > 0]
    left = capacity
    # Tasks that cannot fill their places come first; the places they leave are divided again.
    while open_tasks:
        total = sum(shares[task] for task in open_tasks)
        full = [task for task in open_tasks if available[task] <= left * shares[task] / total]
        if not full:
            break
        for task in full:
            places[task] = available[task]
        left -= sum(available[task] for task in full)
        open_tasks = [task for task in open_tasks if task not in full]
    if open_tasks:
        total = sum(shares[task] for task in open_tasks)
        exact = {task: left * shares[task] / total for task in open_tasks}
        for task in open_tasks:
            places[task] = int(exact[task] + _ROUNDING)
        remainder = left - sum(places[task] for task in open_tasks)
        fractions = {task: exact[task] - places[task] for task in open_tasks}
        for task in largest(fractions, remainder, _ROUNDING):
            places[task] += 1
    return places


def balanced_order(labels: Tensor | None, size: int, generator: torch.Generator) -> Tensor:
    """A random order of ``size`` samples in which every prefix is class-balanced.

    Each round takes one sample of every class that has any left, in random order. So the first samples are a balanced
    choice of any number, and a smaller choice later only discards samples.

    Args:
        labels: Integer class labels, shape [size], or None for a plain random order.
        size: Number of samples.
        generator: Source of randomness, on the CPU.

    Returns:
        A permutation of ``range(size)``, int64.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[balanced_order(labels, 6, torch.Generator().manual_seed(0))][:4].bincount().tolist()
        [2, 2]
    """
    permutation = torch.randperm(size, generator=generator)
    if labels is None:
        return permutation
    shuffled = labels.cpu()[permutation]
    by_class = torch.argsort(shuffled, stable=True)
    _, sizes = torch.unique_consecutive(shuffled[by_class], return_counts=True)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    rounds = torch.empty(size, dtype=torch.long)
    rounds[by_class] = torch.arange(size) - starts
    return permutation[torch.argsort(rounds, stable=True)]

"""How the buffer's places are shared among tasks, and which samples of a task go first."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_odem.flow.largest import largest

_ROUNDING = 1e-9


def allocate(capacity: int, shares: Sequence[float], available: Sequence[int]) -> list[int]:
    """Divide ``capacity`` places in proportion to ``shares``, none getting more than it has samples for.

    With equal shares and enough samples each of k tasks gets floor(N / k) or one more, the earlier tasks first, so
    that the sum is N; none gets more places when another task joins. With unequal shares rounding may add one then.
    Places a task cannot fill go to the others. Places left by rounding down go to the largest remainders, of equal ones
    to the earlier task; remainders are equal if they differ by less than a billionth of a place.

    Args:
        capacity: Places in all, N.
        shares: Non-negative share of each task, at least one positive.
        available: Samples each task could put in.

    Returns:
        Places per task; their sum is min(N, samples available to tasks of positive share).

    Example:
        >>> allocate(10, [1, 1, 1], [100, 100, 100])
        [4, 3, 3]
        >>> allocate(10, [1, 1, 1], [100, 2, 100])
        [4, 2, 4]
        >>> allocate(10, [3, 1], [100, 100]), allocate(10, [1e308, 1e308], [9, 9])
        ([8, 2], [5, 5])
    """
    if math.isinf(sum(shares)):  # of finite shares: relative to the largest their sum is finite
        shares = [share / max(shares) for share in shares]
    places = [0] * len(shares)
    open_tasks = [task for task, share in enumerate(shares) if share > 0]
    left = capacity
    # Tasks that cannot fill their share are settled first; what they leave is divided again.
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
    """A random order of ``size`` samples, every prefix of which is class-balanced.

    The order deals one sample of each class per round, in random order, until the class runs out. Keeping a prefix of
    it is therefore a balanced choice, and keeping a shorter one later discards samples without choosing new ones.

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

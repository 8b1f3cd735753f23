"""Which values are largest, decided so that rounding does not matter."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key")


def largest(values: Mapping[Key, float], count: int, tolerance: float) -> list[Key]:
    """Return the keys of the ``count`` largest values, in the order of the mapping; among equal values the first count.

    Args:
        values: The values.
        count: Largest number of keys to return.
        tolerance: Values that differ by at most this are equal.

    Example:
        >>> largest({"a": 0.3, "b": 0.1 + 0.2, "c": 0.2}, 1, tolerance=1e-9)  # 0.1 + 0.2 is 0.30000000000000004
        ['a']
    """
    chosen: list[Key] = []
    for key in values:
        admit(chosen, key, values, count, tolerance)
    return chosen


def admit(chosen: list[Key], key: Key, values: Mapping[Key, float], count: int, tolerance: float) -> None:
    """Take one step of :func:`largest` in place: add a key and give up the last of the smallest for it."""
    chosen.append(key)
    if len(chosen) > count:
        smallest = min(values[other] for other in chosen)
        # Not "at most": the difference of two infinities is NaN.
        chosen.remove(next(other for other in reversed(chosen) if not values[other] - smallest > tolerance))


def first_largest(values: Sequence[float], tolerance: float) -> int:
    """Index of the first value that differs from the largest by ``tolerance`` at most.

    Example:
        >>> first_largest([(0.7 + 0.1) / 2, (0.4 + 0.4) / 2], tolerance=1e-9)  # the first is 0.39999999999999997
        0
    """
    lowest = max(values) - tolerance
    return next(index for index, value in enumerate(values) if value >= lowest)

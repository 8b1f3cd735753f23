"""Checks of constructor arguments that the merge methods share."""

import math
from collections.abc import Iterable, Sequence


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError that lists the choices unless ``value`` is one of them."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(choices)}, got {value!r}.")


def check_range(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise a ValueError unless a number is finite and lies in [low, high], or in (low, high] if ``open_low``.

    Example:
        >>> check_range("density", 0.0, 0, 1, open_low=True)
        Traceback (most recent call last):
            ...
        ValueError: density must lie in (0, 1], got density=0.0.
    """
    if not (math.isfinite(value) and (low < value if open_low else low <= value) and value <= high):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name} must lie in {interval}, got {name}={value}.")


def check_patterns(name: str, patterns: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the patterns as a tuple; raise a ValueError for a single string, whose letters would pass for patterns."""
    if isinstance(patterns, str):
        raise ValueError(f"{name} is a list of patterns, got the string {patterns!r}; write [{patterns!r}].")
    return None if patterns is None else tuple(patterns)

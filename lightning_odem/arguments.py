"""Checks of constructor arguments, for all rooms: a wrong value is refused where it is given.

Each check returns the value as a plain number, boolean, string or tuple, or raises a ValueError that says argument,
range and value. What an argument could not even be compared with is refused in the same words.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

LARGEST_INTEGER = 2**31 - 1
LARGEST_NUMBER = 1e18
"""Its square is finite in float32."""
LARGEST_IMAGE = 16384
"""Height and width; an RGB image of that size takes 800 MB."""
LEAST_STEP = 1e-6
"""Shortest useful step of a path from 0 to 1: a million gradients."""

T = TypeVar("T")


def check_choice(name: str, value: T, choices: Iterable[Any]) -> T:
    """Return the value if it is one of the choices, which are strings or booleans."""
    choices = list(choices)
    if not isinstance(value, (str, bool)) or value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(str, choices))}, got {shown(value)}.")
    return value


def check_range(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return a finite number in [low, high], of which either end may be open.

    Without an upper end, numbers up to 1e18 are allowed.

    Example:
        >>> check_range("density", 0.0, 0, 1, open_low=True)
        Traceback (most recent call last):
            ...
        ValueError: density must lie in (0, 1], got density=0.0.
    """
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == math.inf else ']'}"
    number = _converted(float, value)
    if number is None or isinstance(value, (str, bytes, bool)):
        raise ValueError(f"{name} must be a number in {interval}, got {name}={shown(value)}.")
    above, below = (low < number if open_low else low <= number), (number < high if open_high else number <= high)
    if not (math.isfinite(number) and above and below):
        raise ValueError(f"{name} must lie in {interval}, got {name}={shown(value)}.")
    if number > LARGEST_NUMBER:
        raise ValueError(f"{name} must be {LARGEST_NUMBER:g} at most, got {name}={shown(value)}.")
    return value if type(value) is int else number  # settings that were kept as integers stay integers


def check_integer(name: str, value: Any, low: int, high: int = LARGEST_INTEGER) -> int:
    """Return an integer in [low, high]; without an upper end, integers of 32 bits are allowed.

    Example:
        >>> check_integer("batch_size", 1.5, 1)
        Traceback (most recent call last):
            ...
        ValueError: batch_size must be an integer in [1, inf), got batch_size=1.5.
    """
    interval = f"[{low}, {'inf)' if high == LARGEST_INTEGER else f'{high}]'}"
    number = _converted(operator.index, value)
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer in {interval}, got {name}={shown(value)}.")
    if not low <= number <= high:
        most = f" and be {high} at most" if number > high == LARGEST_INTEGER else ""
        raise ValueError(f"{name} must lie in {interval}{most}, got {name}={shown(value)}.")
    return number


def check_step(name: str, value: Any) -> float:
    """Return the length of the steps of a path from 0 to 1, in (0, 1]."""
    step = check_range(name, value, 0, 1, open_low=True)
    if step < LEAST_STEP:
        raise ValueError(f"{name} must be {LEAST_STEP:g} at least, a million steps, got {name}={shown(value)}.")
    return step


def check_seed(name: str, value: Any) -> int:
    """Return a seed that the generators of torch and numpy take, also after a small number is added."""
    return check_integer(name, value, 0, 2**63 - 1)


def check_flag(name: str, value: Any) -> bool:
    """Return a boolean; a string such as "false" would pass for true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {name}={shown(value)}.")
    return value


def check_patterns(name: str, patterns: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the patterns as a tuple; a single string is refused because its letters would pass for patterns."""
    if patterns is None:
        return None
    if isinstance(patterns, str):
        raise ValueError(f"{name} is a list of patterns, got the string {patterns!r}; write [{patterns!r}].")
    return check_names(name, patterns)


def check_names(name: str, values: Any) -> tuple[str, ...]:
    """Return a list, tuple or other collection of strings as a tuple."""
    found = _converted(tuple, values)
    if found is None or isinstance(values, (str, bytes)) or not all(isinstance(entry, str) for entry in found):
        raise ValueError(f"{name} must be a list of strings, got {name}={shown(values)}.")
    return found


def check_path(name: str, value: Any) -> Path:
    """Return a path that names something."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise ValueError(f"{name} must be the path of a file or directory, got {name}={shown(value)}.")
    return Path(value)


def check_instance(name: str, value: T, kind: type | tuple[type, ...], what: str) -> T:
    """Return the value if it is an instance of ``kind``, which the message calls ``what``."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {what}, got {name}={shown(value)}.")
    return value


def shown(value: Any) -> str:
    """A value as it is shown in a message: short, in one line, and also where it cannot show itself."""
    try:
        text = repr(value)
    except Exception:  # integers of more than 4300 digits among others
        return f"a value of type {type(value).__name__}"
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _converted(convert: Callable[[Any], T], value: Any) -> T | None:
    try:
        return convert(value)
    except Exception:  # the type of the value decides which
        return None

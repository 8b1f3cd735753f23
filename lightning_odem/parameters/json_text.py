"""JSON as reports and states are written: in lines that people can read, quickly."""

import json
import math
from collections.abc import Callable
from typing import Any

_one_line = json.JSONEncoder(allow_nan=False).encode


class JsonText(str):
    """A value that is JSON already; :func:`json_lines` takes it as it is."""


def json_lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON with containers broken into lines down to a depth, and one line for each thing below.

    A list that holds no containers is one line. To break everything, as ``json.dumps(indent=...)`` does, takes many
    times as long.

    Example:
        >>> print(json_lines({"tasks": ["a", "b"], "accuracy": [[0.5], [0.5, 1.0]]}, depth=2))
        {
         "tasks": ["a", "b"],
         "accuracy": [
          [0.5],
          [0.5, 1.0]
         ]
        }
    """
    if isinstance(value, JsonText):
        return value
    is_flat = isinstance(value, list) and not any(isinstance(entry, (dict, list, JsonText)) for entry in value)
    if not depth or not value or is_flat or not isinstance(value, (dict, list)):
        return _one_line(value)
    inner = indent + " "
    lines = [json_lines(entry, depth - 1, inner) for entry in (value.values() if isinstance(value, dict) else value)]
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {line}" for key, line in zip(value, lines, strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{closing}"


def nan_to_none(value: Any) -> Any:
    """None for a float that is not finite, because JSON has no number for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def none_to_nan(value: Any) -> Any:
    """NaN for None."""
    return math.nan if value is None else value


_MAY_BE_NONE = ("checkpoint", "epoch")


def map_values(data: Any, convert: Callable[[Any], Any]) -> Any:
    """Apply ``convert`` to every leaf of nested dicts and lists, except to those that may be None themselves."""
    if isinstance(data, dict):
        return {key: value if key in _MAY_BE_NONE else map_values(value, convert) for key, value in data.items()}
    if isinstance(data, list):
        is_flat = {float, int, str}.issuperset(map(type, data))  # long lists of numbers are common
        return list(map(convert, data)) if is_flat else [map_values(value, convert) for value in data]
    return convert(data)

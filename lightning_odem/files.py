"""Files that are there completely or not at all, and numbers that JSON can hold."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file in one step: a reader sees the old one or the new one, never half of it.

    Yields:
        Where to write; takes the place of ``path`` at the end of the block, and is gone if the block fails.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/new.txt") as draft:
        ...         _ = draft.write_text("complete")
        ...     Path(folder, "new.txt").read_text()
        'complete'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def nan_to_none(value: Any) -> Any:
    """None for a float that is not finite, which JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def none_to_nan(value: Any) -> Any:
    """NaN for None."""
    return math.nan if value is None else value


def map_values(data: Any, convert: Callable[[Any], Any]) -> Any:
    """Apply ``convert`` to every leaf of nested dicts and lists, but for what is optional by itself: checkpoints."""
    if isinstance(data, dict):
        return {key: value if key == "checkpoint" else map_values(value, convert) for key, value in data.items()}
    if isinstance(data, list):
        return [map_values(value, convert) for value in data]
    return convert(data)

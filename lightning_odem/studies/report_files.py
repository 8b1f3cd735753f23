"""Files that the studies' reports have in common."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_odem.parameters.json_text import map_values, nan_to_none


def save_report(
    name: str,
    directory: str | os.PathLike,
    *,
    data: Any,
    columns: Sequence[str],
    rows: Iterable[Mapping[str, Any]],
    table: str,
    figure: Figure,
) -> list[Path]:
    """Write a report as ``<name>.json``, ``<name>.csv``, ``<name>.txt`` and ``<name>.png``.

    Args:
        name: Name of the files.
        directory: Directory to write to. It is created if it does not exist.
        data: All results as plain data. NaN becomes ``null``.
        columns: Names of the CSV columns.
        rows: Rows of the CSV file by column.
        table: The text.
        figure: The figure.

    Returns:
        The files written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"{name}.{kind}" for kind in ("json", "csv", "txt", "png")]
    text = json.dumps(map_values(data, nan_to_none), indent=1, allow_nan=False)
    files[0].write_text(text, encoding="utf-8")
    write_csv(files[1], columns, rows)
    files[2].write_text(table, encoding="utf-8")
    figure.savefig(files[3])
    return files


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a CSV file. NaN becomes an empty field.

    Args:
        path: The file.
        columns: Names of the columns, in order.
        rows: Values by column.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: nan_to_none(value) for name, value in row.items()} for row in rows)

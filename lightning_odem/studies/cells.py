"""The cells of a study: each result is kept in a file, so a study that is started again runs only missing cells."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_odem.parameters.files import replacing
from lightning_odem.report.plain import plain


def write_json(result: Any, path: Path) -> None:
    """Write plain data as a JSON file in one step."""
    text = json.dumps(result, indent=1, allow_nan=False)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read plain data from a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


class Cell(NamedTuple):
    """A part of a study that is run as a whole.

    Args:
        path: File that exists once the result is kept. Its path should follow from all that decides the result.
        description: Text of the progress display while the cell runs.
        run: Computes the result.
        write: Writes a result, given the result and ``path``. It writes the file in one step.
        read: Reads a result from ``path``.
    """

    path: Path
    description: str
    run: Callable[[], Any]
    write: Callable[[Any, Path], Any] = write_json
    read: Callable[[Path], Any] = read_json


def run_cells(cells: Sequence[Cell], show_progress: bool) -> list[Any]:
    """Run the cells that have no file yet, one after the other, and read the results of all.

    Args:
        cells: The cells.
        show_progress: Show how many cells are done and the time left.

    Returns:
        The results as they are read from the files, in the order of the cells.
    """
    results = []
    with Display(len(cells), show_progress) as display:
        for cell in cells:
            if cell.path.exists():
                display.skip()
            else:
                display.begin(cell.description)
                cell.write(cell.run(), cell.path)
                display.done()
            results.append(cell.read(cell.path))
    return results


class Display:
    """Shows how many cells are done, the time they took and the time left.

    Args:
        cells: Number of all cells.
        enabled: Whether to show anything.
    """

    def __init__(self, cells: int, enabled: bool) -> None:
        columns: list[Any] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("cells,"),
        ]
        columns += [TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left")]
        # Methods differ in cost by orders of magnitude, so the time left is estimated from all cells so far.
        self._progress = Progress(*columns, disable=not enabled, speed_estimate_period=1e9)
        self._cells, self._skipped = cells, 0
        self._line: Any = None

    def __enter__(self) -> "Display":
        self._progress.start()
        self._line = self._progress.add_task("", total=self._cells)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._skipped:
            rank_zero_info(f"{self._skipped} of {self._cells} cells were done before.")

    def begin(self, description: str) -> None:
        """Show what is being done."""
        self._progress.update(self._line, description=plain(description))

    def done(self) -> None:
        """Count a cell that was run."""
        self._progress.advance(self._line)

    def skip(self) -> None:
        """Remove a cell that was run before from the count."""
        # Cells that took no time would make the others look faster than they are.
        self._skipped += 1
        self._progress.update(self._line, total=self._cells - self._skipped)

"""The progress of a study."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_odem.report.plain import plain


class Display:
    """Shows cells done of all, the time they took and the time left.

    Args:
        cells: Cells in all.
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
        # Methods differ in cost by orders of magnitude, so the time left is judged by all cells so far.
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
        """Say what is being done."""
        self._progress.update(self._line, description=plain(description))

    def done(self) -> None:
        """Count a cell."""
        self._progress.advance(self._line)

    def skip(self) -> None:
        """Take out a cell that was done before."""
        # Cells that took no time would make the others look faster than they are.
        self._skipped += 1
        self._progress.update(self._line, total=self._cells - self._skipped)

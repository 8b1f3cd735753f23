"""The report of a stream on disk: what can always be written again from the state."""

import itertools
import math
import os
import time
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_odem.report import StreamReport, save
from lightning_odem.report.plain import plain

ALWAYS_DRAWN = 20


class ReportFiles:
    """``report.json``, ``table.txt`` and the figures in the directory of a stream.

    Args:
        directory: The directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "report.json"
        self._drawn, self._cost = -math.inf, 0.0  # when the figures of scores were drawn, and in what time
        self.behind = False
        """Whether the figures of scores lack merges of the report."""

    def read(self) -> StreamReport:
        """The report on disk; an empty one if there is none.

        Raises:
            ValueError: If the file is not a report.
        """
        return StreamReport.load(self._path) if self._path.exists() else StreamReport()

    def hold(self, report: StreamReport) -> bool:
        """Whether the report on disk tells of the same tasks."""
        try:
            written = self.read()
        except ValueError:
            return False
        return written.tasks == report.tasks and len(written.removed) == len(report.removed)

    def write(self, report: StreamReport, first_path: int) -> list[Path]:
        """Write the report and return its files; if that fails there is only a warning.

        In a stream of more than 20 tasks, the page and the figures of scores are left as they are while to draw them
        would take more than a twentieth of the time.

        Args:
            report: The report.
            first_path: Index of the first merge whose path is drawn, see :func:`~lightning_odem.report.save`.
        """
        started = time.monotonic()
        due = len(report.tasks) <= ALWAYS_DRAWN or started - self._drawn >= 20 * self._cost
        try:
            written = save(report, self._directory, first_path=first_path, scores=due)
            self.behind = not due
            if due:
                self._drawn, self._cost = time.monotonic(), time.monotonic() - started
            return written
        except OSError as error:
            rank_zero_warn(
                f"The stream is written and kept, but its report could not be written: {error}. The next merge, or "
                "remaining() of the callback, writes it."
            )
            return []

    def mend(self, report: StreamReport) -> None:
        """Write the report of the state again, and keep one that tells of more tasks."""
        self.keep_evidence(report)
        rank_zero_info(f"The report in {self._directory} is not that of the stream and written again.")
        save(report, self._directory)

    def keep_evidence(self, report: StreamReport) -> None:
        """Put a report aside that tells of more tasks than the state on disk, whose report is given."""
        try:
            written = self.read()
        except ValueError:
            return
        gone = {record.task for record in report.removed}
        if lost := [task for task in written.tasks if task not in report.tasks and task not in gone]:
            kept = _free(self._path.with_name("report.json.ahead"))
            os.replace(self._path, kept)
            rank_zero_warn(
                f"{self._path} tells of tasks that the state of the stream does not hold: "
                f"{', '.join(map(plain, lost))}. The newest files of the state have been lost or put back; the stream "
                f"continues without these tasks. That report is kept as {kept.name}. If there is a copy of the folder "
                "'stream', put it back before the next fit."
            )


def _free(path: Path) -> Path:
    """A path that names nothing yet: this one, or with the first number that is free."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())

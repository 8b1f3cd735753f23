"""A report as files in a directory."""

import os
import re
from hashlib import sha256
from pathlib import Path

from lightning_odem.parameters.files import read_regular, replacing
from lightning_odem.report.changes_figure import plot_changes
from lightning_odem.report.figures import plot_accuracy_matrix, plot_accuracy_over_stream, plot_path
from lightning_odem.report.merge_record import MergeRecord
from lightning_odem.report.page import CAPTIONS, render_page
from lightning_odem.report.record import StreamReport
from lightning_odem.report.search_figure import plot_search
from lightning_odem.report.tables import first_shown, render_summary

# Bytes of a task's name in the name of a file; file systems allow 255 in all, and a draft has a longer name.
_LONGEST = 200


def save(report: StreamReport, directory: str | os.PathLike, first_path: int = 0, scores: bool = True) -> list[Path]:
    """Write ``report.json``, ``report.html``, ``table.txt`` and the figures; files of the same names are replaced.

    The figures are ``accuracy_matrix.png``, ``accuracy_over_stream.png``, ``changes.png`` and, for every merge that
    followed a path, ``path-<number>-<task>.png``. The page has those that are in the directory. Without any score there
    are no figures of scores.

    Args:
        report: What to write.
        directory: Directory to write to. It is created if it does not exist.
        first_path: Index of the first merge whose path is drawn, -1 for the last one. Earlier figures stay as they are,
            so they are not all drawn again after every merge.
        scores: Whether the page is written and, if anything was measured, the figures of scores are drawn.

    Returns:
        The files written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "table.txt"]
    with replacing(written[0]) as draft:
        draft.write_text(render_summary(report, width=120), encoding="utf-8")
    figures = {}
    if scores and report.has_scores:
        figures["accuracy_matrix"] = plot_accuracy_matrix(report)
        figures["accuracy_over_stream"] = plot_accuracy_over_stream(report)
        figures["changes"] = plot_changes(report)
    for number, record in list(enumerate(report.merges, start=1))[first_path:]:
        if len(record.path.get("t", [])) > 1:
            figures[_path_name(number, record)] = (plot_search if record.path.get("scale") else plot_path)(record)
    for name, figure in figures.items():
        written.append(directory / f"{name}.png")
        with replacing(written[-1]) as draft:
            figure.savefig(draft, format="png")
    if scores and report.merges:
        written.append(directory / "report.html")
        with replacing(written[-1]) as draft:
            draft.write_text(_page(report, directory), encoding="utf-8")
    # Written last: if it is up to date, the others are too.
    return [*written, report.save(directory / "report.json")]


def _path_name(number: int, record: MergeRecord) -> str:
    task = re.sub(r"[^\w.-]+", "_", record.task)
    if len(task.encode()) > _LONGEST:
        task = f"{task.encode()[: _LONGEST - 9].decode(errors='ignore')}-{sha256(task.encode()).hexdigest()[:8]}"
    return f"path-{number:02d}-{task}"


def _page(report: StreamReport, directory: Path) -> str:
    """The page, with figures as they are in the directory: most of them were drawn after earlier merges."""
    figures = {name: _read(directory, name) for name in CAPTIONS}
    paths = {
        index: _read(directory, _path_name(index + 1, record))
        for index, record in list(enumerate(report.merges))[first_shown(report) :]
        if len(record.path.get("t", [])) > 1
    }
    return render_page(
        report,
        {name: png for name, png in figures.items() if png is not None},
        {index: png for index, png in paths.items() if png is not None},
    )


def _read(directory: Path, name: str) -> bytes | None:
    try:
        return read_regular(directory / f"{name}.png")
    except OSError:
        return None

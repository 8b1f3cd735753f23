"""A report as files in a directory."""

import os
import re
from pathlib import Path

from lightning_odem.parameters.files import replacing
from lightning_odem.report.figures import plot_accuracy_matrix, plot_accuracy_over_stream, plot_path
from lightning_odem.report.record import StreamReport
from lightning_odem.report.search_figure import plot_search
from lightning_odem.report.tables import render_summary


def save(report: StreamReport, directory: str | os.PathLike, first_path: int = 0, scores: bool = True) -> list[Path]:
    """Write ``report.json``, ``table.txt`` and the figures; files of the same names are replaced.

    The figures are ``accuracy_matrix.png``, ``accuracy_over_stream.png`` and, for every merge that followed a path,
    ``path-<number>-<task>.png``. Without any score there are no figures of scores.

    Args:
        report: What to write.
        directory: Directory to write to. It is created if it does not exist.
        first_path: Index of the first merge whose path is drawn, -1 for the last one. Earlier figures stay as they are,
            so they are not all drawn again after every merge.
        scores: Whether the two figures of scores are drawn, if anything was measured.

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
    for number, record in list(enumerate(report.merges, start=1))[first_path:]:
        if len(record.path.get("t", [])) > 1:
            task = re.sub(r"[^\w.-]+", "_", record.task)
            figures[f"path-{number:02d}-{task}"] = (plot_search if record.path.get("scale") else plot_path)(record)
    for name, figure in figures.items():
        written.append(directory / f"{name}.png")
        with replacing(written[-1]) as draft:
            figure.savefig(draft, format="png")
    # Written last: if it is up to date, the others are too.
    return [*written, report.save(directory / "report.json")]

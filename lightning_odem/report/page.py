"""A report as one HTML page that needs no other file, no network and no script."""

from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from math import isfinite, isnan
from typing import Any

from jinja2 import Environment, Template

from lightning_odem.report.changes_figure import changes
from lightning_odem.report.conclusions import conclude, worse_than_expected
from lightning_odem.report.plain import plain
from lightning_odem.report.record import StreamReport
from lightning_odem.report.stopping import why_there
from lightning_odem.report.tables import accuracy_cells, accuracy_title, first_shown, left_out, removals
from lightning_odem.version import __version__

CAPTIONS = {
    "accuracy_matrix": "Score of each model on each task",
    "changes": "What each merge changed for each task",
    "accuracy_over_stream": "Scores over the stream",
}
"""What the figures of a whole stream show, by their names."""
_MOST_LETTERS = 100  # of names beside each other in the header of a table


def render_page(report: StreamReport, figures: Mapping[str, bytes], paths: Mapping[int, bytes]) -> str:
    """Summary, table, figures and settings of a stream, and a section for each of its merges, as HTML.

    Figures are part of the page. Names are text, whatever they are. Of a long stream the last merges are shown.

    Args:
        report: A report of at least one merge.
        figures: PNG images of the figures of :data:`CAPTIONS` that there are.
        paths: PNG images of single merges, by their 0-based index.

    Example:
        >>> from lightning_odem.report import MergeRecord
        >>> report = StreamReport(["<b>"], [1.0], [[0.5]], [0.1], [0.5], [0.1], [MergeRecord("<b>", 1.0, "ode")])
        >>> "<summary>1. &lt;b&gt;</summary>" in render_page(report, {}, {})
        True
    """
    first, changed = first_shown(report), changes(report)
    header, rows = accuracy_cells(report, numbered=sum(map(len, report.tasks[first:])) > _MOST_LETTERS)
    return _template().render(
        tasks=len(report.tasks),
        conclusion=conclude(report),
        title=accuracy_title(report),
        header=["\n".join(map(plain, name.split("\n"))) for name in header],
        rows=[list(map(plain, row)) for row in rows],
        remarks=list(map(plain, [*left_out(report), *removals(report)])),
        figures={CAPTIONS[name]: _embedded(figures[name]) for name in CAPTIONS if name in figures},
        settings=_settings(report),
        merges=[_merge(report, index, changed[index], paths.get(index)) for index in range(first, len(changed))],
        first=first,
    )


@cache
def _template() -> Template:
    source = files("lightning_odem.report").joinpath("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True).from_string(source)


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _settings(report: StreamReport) -> dict[str, str]:
    last = report.merges[-1]
    metrics = dict.fromkeys(report.metric_of(task).label for task in report.tasks)
    samples = [f"{plain(task)}: {count}" for task, count in last.calibration.items()]
    return {
        "method": ", ".join(dict.fromkeys(record.method for record in report.merges)),
        "measured by": ", ".join(map(plain, metrics)),
        "utility weights": ", ".join(f"{plain(t)}: {w:.4g}" for t, w in zip(report.tasks, report.weights, strict=True)),
        "calibration samples": ", ".join(samples) or "none",
        "written by": f"lightning-odem {__version__}",
    }


def _merge(report: StreamReport, index: int, change: list[float], png: bytes | None) -> dict[str, Any]:
    record = report.merges[index]
    found = zip(report.tasks, change, strict=False)  # rows are ragged
    changed = [f"{plain(task)} {report.metric_of(task).text(value, '+')}" for task, value in found if not isnan(value)]
    facts = {
        "utility weight": f"{report.weights[index]:.4g}",
        "operating time t": f"{record.t:.4g}",
        "seconds": f"{record.merge_seconds:.2f} (gradients: {record.gradient_seconds:.2f})",
        "seconds of evaluation": f"{record.evaluation_seconds:.2f}",
        "calibration loss": f"{record.loss_before:.4g} before, {record.loss_after:.4g} after, "
        f"{record.loss_incoming:.4g} incoming model"
        if isfinite(record.loss_after)
        else "not measured",
        "scores after minus before": ", ".join(changed) or "not measured",
    }
    if record.discarded > 0.0:
        facts["cut from adapters"] = f"{record.discarded:.1%} of their updates, to keep their rank"
    if record.epoch is not None:
        facts["merged epoch"] = str(record.epoch)
    if record.checkpoint:
        facts["merged weights"] = plain(record.checkpoint)
    return {
        "task": plain(record.task),
        "why": why_there(report, index),
        "warnings": [f"{text[0].upper()}{text[1:]}." for text in worse_than_expected(report, index)],
        "facts": facts,
        "figure": png and _embedded(png),
    }

"""Whatever the tasks are called, their figures can be read."""

from itertools import combinations

import pytest

from lightning_odem.report import (
    MergeRecord,
    StreamReport,
    plot_accuracy_matrix,
    plot_accuracy_over_stream,
    plot_changes,
    plot_path,
)
from lightning_odem.report.drawing import LONGEST_NAME, shown

HOSTILE = [r"from $\frac$5 to $10", "_hidden", "a\x1b[2J\nb", "x" * 200, r"$\notacommand$", "<b>&amp;</b>"]
LONG = [
    f"{what} in the {when} of winter" for what in ("photographs", "signs", "texts") for when in ("deep", "last days")
]
TEN = [*LONG, *(f"{name}, once more" for name in LONG[:4])]


def report_of(tasks: list[str]) -> StreamReport:
    path = {"t": [0.0, 0.5], "loss": [1.0, 0.9], "gamma": [1.0], "alignment_ratio": [0.5]}
    size = len(tasks)
    return StreamReport(
        tasks=tasks,
        weights=[1.0] * size,
        accuracy=[[0.5] * (k + 1) for k in range(size)],
        pretrained=[0.1] * size,
        fine_tuned=[1.0] * size,
        before_training=[0.1] * size,
        merges=[MergeRecord(task, 0.5, "ode_paper", path, loss_incoming=1.5) for task in tasks],
    )


def test_names_from_files_are_text_and_no_formulas() -> None:
    report = report_of(HOSTILE)
    figures = [plot_accuracy_matrix(report), plot_accuracy_over_stream(report), plot_path(report.merges[0])]
    for figure in figures:
        figure.draw_without_rendering()
    entries = [text.get_text() for text in figures[1].legends[0].get_texts()]
    assert [entry.strip() for entry in entries if "hidden" in entry or "2J" in entry] == ["_hidden", r"a\x1b[2J\nb"]


def test_a_long_name_keeps_its_ends() -> None:
    name = shown("beginning" + "x" * 100 + "end")
    assert len(name) <= LONGEST_NAME
    assert name.startswith("beginning")
    assert name.endswith("end")


@pytest.mark.parametrize("plot", [plot_accuracy_matrix, plot_accuracy_over_stream, plot_changes])
def test_ten_long_names_stay_apart_and_inside(plot) -> None:
    figure = plot(report_of(TEN))
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes if axes.images for text in axes.get_yticklabels()]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.corners())
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    assert all(axes.bbox.width > 0.25 * figure.bbox.width for axes in figure.axes if axes.get_xlabel())

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_odem.report import MergeRecord, StreamReport, render_summary, save


@pytest.fixture
def report() -> StreamReport:
    path = {"t": [0.0, 0.5], "loss": [1.0, 0.9], "gamma": [1.0], "alignment_ratio": [0.5]}
    return StreamReport(
        tasks=["a", "b/c d"],
        weights=[1.0, 1.0],
        accuracy=[[0.9], [0.8, 0.7]],
        pretrained=[0.1, 0.2],
        fine_tuned=[0.9, 0.8],
        before_training=[0.1, 0.2],
        merges=[MergeRecord("a", 1.0, "odem"), MergeRecord("b/c d", 0.5, "odem", path, loss_incoming=1.5)],
    )


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


def test_directory_holds_json_text_and_figures(report: StreamReport, tmp_path: Path) -> None:
    written = save(report, tmp_path / "new")
    figures = ["accuracy_matrix.png", "accuracy_over_stream.png", "changes.png", "path-02-b_c_d.png"]
    expected = [*figures, "report.html", "report.json", "table.txt"]
    assert names(tmp_path / "new") == sorted(file.name for file in written) == expected
    assert StreamReport.load(tmp_path / "new" / "report.json").accuracy == report.accuracy
    assert (tmp_path / "new" / "table.txt").read_text(encoding="utf-8") == render_summary(report, 120)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written if file.suffix == ".png")


def test_only_later_paths_are_drawn_on_request(report: StreamReport, tmp_path: Path) -> None:
    report.merges[0] = report.merges[1]
    written = save(report, tmp_path, first_path=-1)
    assert [file.name for file in written if file.name.startswith("path")] == ["path-02-b_c_d.png"]


def test_empty_report_has_no_figures(tmp_path: Path) -> None:
    save(StreamReport(), tmp_path)
    assert names(tmp_path) == ["report.json", "table.txt"]


def test_pipes_of_the_names_of_outputs_are_replaced(report: StreamReport, tmp_path: Path) -> None:
    for name in ("table.txt", "accuracy_matrix.png", "report.json"):
        os.mkfifo(tmp_path / name)
    assert all(file.is_file() for file in save(report, tmp_path))


def test_the_page_has_the_figures_of_earlier_merges_too(report: StreamReport, tmp_path: Path) -> None:
    report.merges[0] = report.merges[1]
    save(report, tmp_path)
    whole = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert whole.count('src="data:image/png') == 5
    save(report, tmp_path, first_path=-1)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == whole


def test_the_page_goes_without_figures_that_cannot_be_read(report: StreamReport, tmp_path: Path) -> None:
    report.merges[0] = report.merges[1]
    os.mkfifo(tmp_path / "path-01-b_c_d.png")
    save(report, tmp_path, first_path=-1)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count('src="data:image/png') == 4


@pytest.mark.parametrize("letter", ["x", "\u6570"], ids=["latin", "chinese"])
def test_names_longer_than_file_systems_allow_are_cut(letter: str, report: StreamReport, tmp_path: Path) -> None:
    report.tasks = [report.merges[0].task, 300 * letter]
    report.merges = [report.merges[0], replace(report.merges[1], task=300 * letter)]
    written = save(report, tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count('src="data:image/png') == 4
    assert max(len(file.name.encode()) for file in written) < 240

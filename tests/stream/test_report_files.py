from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.stream.report_files import ReportFiles


def report_of(size):
    names = [f"t{k}" for k in range(size)]
    values = [[0.5] * size] * 3
    merges = [MergeRecord(name, 1.0, "average") for name in names]
    return StreamReport(names, [1.0] * size, [[0.5] * (k + 1) for k in range(size)], *values, merges)


def test_figures_of_a_short_stream_are_drawn_after_every_merge(tmp_path):
    files = ReportFiles(tmp_path)
    for size in (1, 2):
        files.write(report_of(size), first_path=-1)
        assert not files.behind
        (tmp_path / "accuracy_matrix.png").unlink()


def test_figures_of_a_long_stream_wait_while_drawing_takes_longer_than_the_tasks(tmp_path):
    files = ReportFiles(tmp_path)
    files.write(report_of(21), first_path=-1)
    before = (tmp_path / "accuracy_matrix.png").stat().st_mtime_ns
    files.write(report_of(22), first_path=-1)
    assert files.behind
    assert (tmp_path / "accuracy_matrix.png").stat().st_mtime_ns == before
    assert StreamReport.load(tmp_path / "report.json").tasks[-1] == "t21"


def test_figures_of_nothing_measured_are_not_drawn(tmp_path):
    report = report_of(1)
    report.accuracy = [[float("nan")]]
    ReportFiles(tmp_path).write(report, first_path=-1)
    assert not list(tmp_path.glob("*.png"))

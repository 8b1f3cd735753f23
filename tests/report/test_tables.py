import pytest
from torch import nan

from lightning_odem.metrics import TaskMetric
from lightning_odem.report import MergeRecord, StreamReport, render_costs, render_summary, render_table


def make_report(size: int, weights: list[float] | None = None) -> StreamReport:
    """A report whose accuracies are all different, also with one decimal of a percent."""
    return StreamReport(
        tasks=[f"task_{chr(97 + index)}" for index in range(size)],
        weights=weights or [1.0] * size,
        accuracy=[[(20 * k + i) / 1000 for i in range(k + 1)] for k in range(size)],
        pretrained=[(500 + i) / 1000 for i in range(size)],
        fine_tuned=[(900 + i) / 1000 for i in range(size)],
        before_training=[nan] * size,
        merges=[MergeRecord(f"task_{chr(97 + index)}", 1 / (index + 1), "odem") for index in range(size)],
    )


def cell(text: str, row: str, column: str) -> str:
    """Text that ends below the end of a column's name, in the block of lines that has this column."""
    for block in text.split("\n\n"):
        lines = block.split("\n")
        for line in lines[:2]:
            if column in line.split():
                end = f"{line} ".index(f" {column} ") + len(column) + 1
                return next((line[end - 5 : end].strip() for line in lines if f"{line}  ".startswith(f"{row}  ")), "")
    raise AssertionError(f"no column {column}")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 20])
def test_every_accuracy_stands_at_its_place(size: int, width: int) -> None:
    report = make_report(size)
    text = render_table(report, width)
    numbered = "#1" in text
    assert numbered == (size == 20 or (size == 8 and width == 80))
    assert max(map(len, text.splitlines())) <= width
    for i, task in enumerate(report.tasks):
        column = f"#{i + 1}" if numbered else task
        assert cell(text, "pretrained", column) == f"{50 + i / 10:.1f}"
        assert cell(text, "fine-tuned", column) == f"{90 + i / 10:.1f}"
        for k, merged in enumerate(report.tasks):
            row = f"after #{k + 1} {merged}" if numbered else f"after {merged}"
            assert cell(text, row, column) == ("" if i > k else f"{2 * k + i / 10:.1f}")


def test_equal_weights_give_acc_and_bwt() -> None:
    report = make_report(2)
    report.pretrained, report.fine_tuned, report.accuracy = [0.5, 0.6], [0.9, 0.8], [[0.9], [0.8, 0.5]]
    text = render_table(report, 80)
    assert "w=" not in text
    assert "_w" not in text
    rows = ("pretrained", "fine-tuned", "after task_a", "after task_b")
    assert [cell(text, row, "ACC") for row in rows] == ["55.0", "85.0", "90.0", "65.0"]
    assert [cell(text, row, "BWT") for row in rows] == ["", "", "—", "-10.0"]


def test_unequal_weights_are_shown_and_used() -> None:
    report = make_report(2, [3.0, 1 / 3])
    report.accuracy = [[0.9], [0.8, 0.3]]
    text = render_table(report, 80)
    assert "w=3  w=0.3333  ACC_w  BWT_w" in text
    assert cell(text, "after task_b", "ACC_w") == "75.0"  # (3 * 80 + 30 / 3) / (3 + 1 / 3)
    assert cell(text, "after task_b", "BWT_w") == "-10.0"


def test_tiny_loss_is_no_negative_zero() -> None:
    report = make_report(2)
    report.accuracy = [[0.9], [0.8999999, 0.5]]
    assert cell(render_table(report, 80), "after task_b", "BWT") == "+0.0"


def test_unmeasured_accuracy_is_a_dash() -> None:
    report = make_report(2)
    report.pretrained[1] = report.accuracy[1][0] = nan
    text = render_table(report, 80)
    assert cell(text, "pretrained", "task_b") == cell(text, "pretrained", "ACC") == "—"
    assert text.splitlines()[-1].split() == ["after", "task_b", "—", "2.1", "—", "—"]


def test_text_is_plain_in_a_colour_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    report = make_report(2)
    report.tasks[0] = "[red]:smile:"
    text = render_summary(report, 120)
    assert "after [red]:smile:" in text
    assert text.replace("—", "").isascii()
    assert "\x1b" not in text


def test_default_width_is_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert render_summary(make_report(20)) == render_summary(make_report(20), 100)


def test_long_names_are_cut() -> None:
    report = make_report(2)
    report.tasks[1] = "x" * 200
    text = render_table(report, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "after #2 xxx" in text


def test_costs_show_each_merge() -> None:
    report = make_report(2)
    report.merges[1] = MergeRecord(
        "task_b", 0.5, "odem", path={"gamma": [1.0, 0.5, 0.75]}, loss_before=1.0, loss_after=0.81234, loss_incoming=2.5,
        barrier=0.0123, gradient_evaluations=10, gradient_seconds=8.0, merge_seconds=10.0,
        evaluation_seconds=0.5,
    )  # fmt: skip
    first, second = (line.split() for line in render_costs(report, 120).splitlines() if line.startswith("task_"))
    assert first == ["task_a", "1.000", "—", "—", "—", "—", "0.0000", "0", "0.00", "—", "—"]
    assert second == [
        "task_b",
        "0.500",
        "1.0000",
        "0.8123",
        "2.5000",
        "0.75",
        "(0.50)",
        "0.0123",
        "10",
        "10.00",
        "25%",
        "0.50",
    ]


def test_costs_of_a_path_without_damping_show_a_dash() -> None:
    report = make_report(1)
    report.merges = [MergeRecord("task_a", 0.5, "released", path={"t": [0.0, 0.5], "loss": [1.0, 0.9], "gamma": []})]
    (row,) = (line.split() for line in render_costs(report, 120).splitlines() if line.startswith("task_"))
    assert row[5] == "—"


def test_costs_fit_a_narrow_terminal() -> None:
    text = render_costs(make_report(20), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\ntask_t ") == 2


def test_summary_is_both_tables() -> None:
    report = make_report(3)
    assert render_summary(report, 120) == f"{render_table(report, 120)}\n{render_costs(report, 120)}"


def test_empty_report_says_so() -> None:
    assert render_summary(StreamReport()) == "No merge yet.\n"


def test_blocks_leave_out_models_that_have_nothing_in_them() -> None:
    last = render_table(make_report(20), 80).split("\n\n")[2]
    assert "#16" in last
    assert "after #8 " not in last
    assert "after #9 " in last


def test_tasks_that_were_taken_out_are_named_below() -> None:
    report = make_report(20).without("task_c").without("task_t")
    text = render_table(report, 80)
    assert max(map(len, text.splitlines())) <= 80
    lines = text[text.index("Taken out") :].split("\n\n")
    assert lines[0].replace("\n", " ").startswith("Taken out: task_c. It was in what was measured after task_d, task_e")
    assert lines[1] == "Taken out: task_t.\n"


def test_scores_in_a_unit_of_their_own_are_shown_as_they_are() -> None:
    report = make_report(2)
    report.metrics = dict.fromkeys(report.tasks, TaskMetric("Perplexity", "", False))
    report.pretrained, report.fine_tuned, report.accuracy = [150.0, 90.0], [8.0, 9.0], [[8.0], [9.5, 9.25]]
    text = render_table(report, 80)
    assert text.startswith("Perplexity (lower is better)\n")
    assert "%" not in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("pretrained", "after task_b"))]
    assert rows == [["pretrained", "150.0", "90.00", "120.0"], ["after", "task_b", "9.500", "9.250", "9.375", "-1.500"]]


def test_unlike_metrics_are_named_and_the_missing_means_explained() -> None:
    report = make_report(2)
    report.metrics = {"task_b": TaskMetric("R2Score", "")}
    text = render_table(report, 80)
    assert text.startswith("Scores\n")
    assert "accuracy %  R2Score" in text
    assert "after task_b         2.0    0.021    —    —\n" in text
    assert "\nNo ACC and BWT: the tasks are measured by unlike metrics, accuracy (%), R2Score.\n" in text


def test_of_a_long_stream_the_last_tasks_are_shown_with_the_means_of_all() -> None:
    report = make_report(60)
    report.tasks = [f"t{k}" for k in range(60)]
    text = render_table(report, 120)
    assert [line.split()[0:3] for line in text.splitlines() if line.startswith("after")][:1] == [
        ["after", "#41", "t40"]
    ]
    assert "These are the last 20 of 60 tasks; report.json has all." in text
    assert cell(text, "after #60 t59", "ACC") == f"{100 * report.acc():.1f}"
    assert len(render_costs(report, 120).splitlines()) < 30

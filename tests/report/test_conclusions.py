from pathlib import Path

from torch import nan

from lightning_odem.metrics import TaskMetric
from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.report.conclusions import in_words


def report(accuracy, metrics=None, tasks=("sea", "land")):
    return StreamReport(
        tasks=list(tasks),
        weights=[1.0, 1.0],
        accuracy=accuracy,
        pretrained=[0.1, 0.2],
        fine_tuned=[0.9, 0.8],
        before_training=[nan, nan],
        merges=[MergeRecord(task, 1.0, "average") for task in tasks],
        metrics=metrics or {},
    )


def test_the_three_models_and_the_task_that_lost_most_are_named():
    text = in_words(report([[0.9], [0.7, 0.8]]))
    assert text == (
        "Mean accuracy on 2 tasks: 75.0 % by the one merged model, 15.0 % by the base model, 85.0 % by each task's own "
        "fine-tuned model.\n"
        "Most was forgotten of sea: 90.0 when it was merged, 70.0 now (BWT -20.0)."
    )


def test_nothing_lost_is_said():
    assert "No task has lost anything since it was merged." in in_words(report([[0.7], [0.7, 0.8]]))


def test_a_rise_is_a_loss_where_lower_is_better():
    error = TaskMetric("error", "", higher_is_better=False)
    text = in_words(report([[0.5], [0.75, 0.8]], {"sea": error, "land": error}))
    assert "Most was forgotten of sea: 0.500 when it was merged, 0.750 now" in text
    assert text.startswith("Mean error (lower is better) on 2 tasks: 0.775 by the one merged model,")


def test_the_page_is_named():
    assert str(Path("here") / "report.html") in in_words(report([[0.7], [0.7, 0.8]]), Path("here"))


def test_tasks_without_a_common_metric_leave_the_files():
    text = in_words(report([[0.5], [0.75, 0.8]], {"sea": TaskMetric("R2", "")}), Path("here"))
    assert text.splitlines()[0] == f"Merged weights: {Path('here') / 'merged-*.ckpt'}"


def test_a_stream_that_was_not_measured_has_nothing_to_tell():
    assert in_words(report([[nan], [nan, nan]])) == ""


def test_names_do_not_control_the_terminal():
    assert "\x1b" not in in_words(report([[0.9], [0.7, 0.8]], tasks=("sea\x1b[2J", "land")))

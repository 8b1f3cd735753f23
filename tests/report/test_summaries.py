import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_odem.metrics import TaskMetric
from lightning_odem.report import MergeRecord, StreamReport

scores = st.one_of(st.floats(0, 1), st.just(math.nan))
ERROR, LOSS = (TaskMetric(name, higher_is_better=False) for name in ("error", "loss"))


@st.composite
def reports(draw):
    size = draw(st.integers(0, 6))
    tasks = [f"t{index}" for index in range(size)]
    some = st.lists(scores, min_size=size, max_size=size)
    kinds = draw(st.sampled_from([[], [ERROR], [ERROR, LOSS]]))
    return StreamReport(
        tasks=tasks,
        weights=draw(st.lists(st.sampled_from([0.0, 1.0, 2.5, 1e308]), min_size=size, max_size=size)),
        accuracy=[draw(st.lists(scores, min_size=row + 1, max_size=row + 1)) for row in range(size)],
        pretrained=draw(some),
        fine_tuned=draw(some),
        before_training=draw(some),
        merges=[MergeRecord(task, 1.0, "average") for task in tasks],
        metrics={task: kinds[min(index, len(kinds) - 1)] for index, task in enumerate(tasks) if kinds},
    )


def bits(values):
    return torch.tensor(values, dtype=torch.float64).view(torch.int64).tolist()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(reports())
def test_all_merges_at_once_give_the_numbers_of_each_merge_bit_for_bit(report):
    found = report.summaries()
    for name in ("acc", "bwt", "forgetting", "fwt"):
        expected = [getattr(report, name)(merge) for merge in range(len(report.tasks))]
        assert [math.isnan(value) for value in found[name]] == [math.isnan(value) for value in expected]
        pairs = [(a, b) for a, b in zip(found[name], expected, strict=True) if not math.isnan(b)]
        assert bits([a for a, _ in pairs]) == bits([b for _, b in pairs]), name


def long_report(size):
    names = [f"t{index}" for index in range(size)]
    return StreamReport(
        tasks=names,
        weights=[1.0] * size,
        accuracy=[[0.5] * (row + 1) for row in range(size)],
        pretrained=[0.1] * size,
        fine_tuned=[0.9] * size,
        before_training=[0.2] * size,
        merges=[
            MergeRecord(name, 1.0, "average", calibration=dict.fromkeys(names[: row + 1], 1))
            for row, name in enumerate(names)
        ],
    )


def cost(size, repeats=3):
    report = long_report(size)
    times = []
    for _ in range(repeats):
        started = time.process_time()
        report.as_dict()
        times.append(time.process_time() - started)
    return min(times)


def test_the_cost_of_a_report_grows_as_the_report_does():
    cost(10)
    # Twice the tasks are four times the numbers; cubic growth would be 8 times, and was.
    assert cost(400) < 6 * cost(200) + 0.02
    assert cost(200) < 0.5


def test_what_a_report_gives_away_is_not_its_own():
    report = long_report(3)
    data = report.as_dict()
    data["accuracy"][0][0] = data["merges"][0]["calibration"]["t0"] = 7.0
    data["merges"][0]["path"]["t"] = [1.0]
    assert report.accuracy[0] == [0.5]
    assert (report.merges[0].calibration, report.merges[0].path) == ({"t0": 1}, {})


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_report_comes_back_from_its_plain_form(size):
    report = long_report(size)
    assert StreamReport.from_dict(report.as_dict()) == report


def test_merges_added_one_by_one_give_the_summaries_of_all_at_once():
    whole = long_report(7)
    whole.accuracy[3][1] = math.nan
    grown = StreamReport()
    for index, record in enumerate(whole.merges):
        measured = {name: getattr(whole, name)[index] for name in ("pretrained", "fine_tuned", "before_training")}
        grown = grown.with_merge(record, weight=1.0, accuracy=whole.accuracy[index], **measured)
        grown = grown.keeping_checkpoints(2)
    for name, values in whole.summaries().items():
        assert bits(grown.summaries()[name]) == bits(values)


def test_a_task_whose_metric_is_known_later_changes_the_summaries_before():
    first = StreamReport().with_merge(MergeRecord("a", 1.0, "ode"), weight=1.0, accuracy=[math.nan], **UNMEASURED)
    second = first.with_merge(MergeRecord("b", 0.5, "ode"), weight=1.0, accuracy=[2.0, 1.0], **UNMEASURED)
    report = second.with_merge(
        MergeRecord("c", 0.3, "ode"),
        weight=1.0,
        accuracy=[3.0, 1.0, 1.0],
        metrics=dict.fromkeys("abc", ERROR),
        **UNMEASURED,
    )
    assert repr(report.summaries()) == repr(StreamReport.from_dict(report.as_dict()).summaries())


UNMEASURED = dict.fromkeys(("pretrained", "fine_tuned", "before_training"), math.nan)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_stored_report_has_what_was_measured_and_comes_back(size):
    report = long_report(size)
    for row in report.accuracy[:3]:
        row[:] = [math.nan] * len(row)
    stored = report.stored()
    assert "acc" not in stored
    assert stored["accuracy"][:3] == ["[]", "[]", "[]"][:size]
    restored = StreamReport.from_dict(stored)
    assert repr(restored) == repr(report)


def test_an_unmeasured_stream_grows_by_the_same_at_each_task(tmp_path):
    sizes = []
    for size in (50, 100, 150):
        report = long_report(size)
        report.accuracy = [[math.nan] * (row + 1) for row in range(size)]
        for record in report.merges:
            record.calibration = {}
        path = report.save(tmp_path / "report.json")
        assert repr(StreamReport.load(path).accuracy) == repr(report.accuracy)
        sizes.append((path.stat().st_size, len(str(report.stored()))))
    for before, middle, after in zip(*sizes, strict=True):
        assert after - middle < 1.1 * (middle - before)

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

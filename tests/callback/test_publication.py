"""What the numbers say against a merge is told in one line."""

import math
import warnings

import pytest
import torch
from toy import Classifier, Task, fit

from lightning_odem import ContinualMergeCallback
from lightning_odem.callback.publication import worse_than_expected
from lightning_odem.metrics import TaskMetric
from lightning_odem.report import MergeRecord, StreamReport


def report_of(accuracy, pretrained, fine_tuned, metrics=None):
    names = [f"t{number}" for number in range(len(accuracy))]
    count = len(names)
    return StreamReport(
        tasks=names,
        weights=[1.0] * count,
        accuracy=[*([0.0] * row for row in range(1, count)), accuracy],
        pretrained=pretrained,
        fine_tuned=fine_tuned,
        before_training=[math.nan] * count,
        merges=[MergeRecord(name, 1.0, "average") for name in names],
        metrics=metrics or {},
    )


def test_a_merge_that_helped_says_nothing():
    assert worse_than_expected(report_of([0.5, 0.6], [0.5, 0.1], [0.9, 0.9])) == []


def test_what_was_not_measured_is_no_reason_to_warn():
    assert worse_than_expected(report_of([math.nan, 0.6], [0.5, math.nan], [0.9, math.nan])) == []


def test_both_kinds_are_told_with_their_numbers():
    assert worse_than_expected(report_of([0.25, 0.5], [0.5, 0.75], [0.9, 0.625])) == [
        "fine-tuning made its own task worse than the pretrained model is on it (62.5 % instead of 75.0 %)",
        "the merged model is worse than the pretrained one on t0 (25.0 % instead of 50.0 %), t1 (50.0 % instead of "
        "75.0 %)",
    ]


def test_of_many_tasks_three_are_named():
    (told,) = worse_than_expected(report_of([0.1] * 5, [0.2] * 5, [0.9] * 5))
    assert told.endswith("t2 (10.0 % instead of 20.0 %) and 2 tasks more")


def test_where_lower_is_better_more_is_worse():
    metrics = {"t0": TaskMetric("error", higher_is_better=False)}
    assert worse_than_expected(report_of([0.5], [0.75], [0.25], metrics)) == []
    assert len(worse_than_expected(report_of([0.9], [0.75], [0.8], metrics))) == 2


@pytest.mark.usefixtures("small_stream")
def test_a_fit_that_ruins_its_task_warns_once():
    module = Classifier(lr=0.0)
    task = Task(0)
    for _ in range(60):  # a base model that knows the task
        loss = torch.nn.functional.cross_entropy(module(task.train_set.tensors[0]), task.train_set.tensors[1])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    module.lr = 1e4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, task, ContinualMergeCallback(method="average", calibration_size=12), max_epochs=1)
    told = [str(warning.message) for warning in caught if "After task" in str(warning.message)]
    assert len(told) == 1
    assert "fine-tuning made its own task worse" in told[0]
    assert "the merged model is worse than the pretrained one on task_1" in told[0]

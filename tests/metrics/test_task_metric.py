import pytest
import torch
from torch import nan, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassCalibrationError
from torchmetrics.regression import MeanAbsoluteError, R2Score
from torchmetrics.text import Perplexity

from lightning_odem.metrics import ACCURACY, ClassAccuracy, TaskMetric, find_metric


class Owner:
    def __init__(self, metric):
        self.task_metric = lambda task: metric


@pytest.mark.parametrize(
    ("metric", "expected", "label"),
    [
        (ClassAccuracy(), TaskMetric(), "accuracy (%)"),
        (MulticlassAccuracy(3), TaskMetric("MulticlassAccuracy", "%"), "MulticlassAccuracy (%)"),
        (BinaryF1Score(), TaskMetric("BinaryF1Score", "%"), "BinaryF1Score (%)"),
        (R2Score(), TaskMetric("R2Score", ""), "R2Score"),
        (Perplexity(), TaskMetric("Perplexity", "", False), "Perplexity (lower is better)"),
        (
            MulticlassCalibrationError(3),
            TaskMetric("MulticlassCalibrationError", "%", False),
            "MulticlassCalibrationError (%, lower is better)",
        ),
        (MetricCollection([R2Score(), MeanAbsoluteError()], prefix="val/"), TaskMetric("val/R2Score", ""), None),
        (R2Score() * 2, TaskMetric("CompositionalMetric", ""), None),
    ],
)
def test_name_unit_and_direction_are_the_metrics(metric, expected, label):
    assert TaskMetric.of(metric) == expected
    assert label is None or expected.label == label


@pytest.mark.parametrize(
    ("score", "sign", "expected"),
    [
        (0.87345, "", "0.873"),
        (-0.0999999, "+", "-0.100"),
        (0.05, "+", "+0.050"),
        (0.00123456, "", "0.00123"),
        (23.456, "", "23.46"),
        (123.456, "", "123.5"),
        (12345.678, "", "12346"),
        (1.5e7, "", "1.5e+07"),
        (0.0, "+", "+0.000"),
        (-0.0, "", "0.000"),
        (nan, "", "—"),
    ],
)
def test_plain_scores_have_a_sensible_number_of_digits(score, sign, expected):
    assert TaskMetric("R2Score", "").text(score, sign) == expected


def test_the_first_owner_that_knows_the_metric_decides():
    assert type(find_metric("a", Owner(R2Score()), Owner(Perplexity()))) is R2Score
    assert type(find_metric("a", Owner(None), Owner(Perplexity()))) is Perplexity
    assert type(find_metric("a", object(), None)) is ClassAccuracy


def test_an_attribute_that_is_a_metric_is_the_metric_of_all_tasks():
    owner = nn.Module()
    owner.task_metric = R2Score()
    assert type(find_metric("a", owner)) is R2Score


def test_a_metric_found_is_fresh_and_computes_what_this_process_has_seen():
    given = MetricCollection([R2Score(), MeanAbsoluteError()])
    given.update(torch.zeros(3), torch.ones(3))
    found = find_metric("a", Owner(given))
    assert all(metric.update_count == 0 and not metric.sync_on_compute for metric in found.values())
    assert all(metric.update_count == 1 and metric.sync_on_compute for metric in given.values())


@pytest.mark.parametrize("given", ["r2", R2Score, 0.5])
def test_what_is_no_metric_is_refused(given):
    with pytest.raises(ValueError, match=r"task_metric\('a'\) of Owner gives a torchmetrics.Metric"):
        find_metric("a", Owner(given))


def test_accuracy_is_the_default():
    assert TaskMetric() == ACCURACY

import pickle

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nan, tensor
from torch.testing import assert_close
from torchmetrics import MetricCollection

from lightning_odem.metrics import (
    AccuracyMatrix,
    WeightedAccuracy,
    WeightedBackwardTransfer,
    WeightedForgetting,
    backward_transfer,
    forgetting,
    weighted_accuracy,
)

TARGET = tensor([0, 1, 2, 3])
# Right answers out of 4, per (merge, task).
RIGHT = {(0, 0): 2, (1, 0): 4, (1, 1): 3, (2, 0): 1, (2, 1): 4, (2, 2): 2}
# By hand from accuracies 0.25, 1, 0.5 after merge 2; changes -0.25, +0.25; drops from the best 0.75, -0.25.
BY_HAND = {
    WeightedAccuracy: {None: (0.25 + 1 + 0.5) / 3, (2, 1, 1): (2 * 0.25 + 1 + 0.5) / 4},
    WeightedBackwardTransfer: {None: 0.0, (2, 1, 1): (2 * -0.25 + 0.25) / 3},
    WeightedForgetting: {None: (0.75 - 0.25) / 2, (2, 1, 1): (2 * 0.75 - 0.25) / 3},
}
SUMMARIES = list(BY_HAND)


@pytest.fixture(autouse=True)
def agg():
    with plt.rc_context():
        plt.switch_backend("agg")
        yield
        plt.close("all")


def feed(metric, cells):
    for (merge, task), right in cells.items():
        preds = torch.where(torch.arange(4) < right, TARGET, TARGET + 1)
        metric.update(preds, TARGET, merge=merge, task=task)
    return metric


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("weights", [None, (2, 1, 1)])
def test_summary_of_hand_worked_stream(summary, weights):
    value = feed(summary(weights), RIGHT).compute()
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(BY_HAND[summary][weights])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=10, max_size=10), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_summaries_are_the_functions_of_the_accuracy_matrix(right, weights):
    cells = [(merge, task) for merge in range(4) for task in range(merge + 1)]
    cells = dict(zip(cells, right, strict=True))
    matrix, plain = feed(AccuracyMatrix(), cells).compute(), tensor(weights, dtype=torch.float64)
    assert_close(feed(WeightedAccuracy(weights), cells).compute(), weighted_accuracy(matrix[-1], plain))
    assert_close(feed(WeightedBackwardTransfer(weights), cells).compute(), backward_transfer(matrix, plain))
    assert_close(feed(WeightedForgetting(weights), cells).compute(), forgetting(matrix, plain))


@pytest.mark.parametrize("summary", SUMMARIES)
def test_summary_follows_the_last_merge_seen(summary):
    metric = summary()
    values = []
    for last in range(3):
        feed(metric, {cell: right for cell, right in RIGHT.items() if cell[0] == last})
        values.append(metric.compute().item())
    expected = {
        WeightedAccuracy: [0.5, 0.875, BY_HAND[summary][None]],
        WeightedBackwardTransfer: [nan, 0.5, BY_HAND[summary][None]],
        WeightedForgetting: [nan, -0.5, BY_HAND[summary][None]],
    }
    assert values == pytest.approx(expected[summary], nan_ok=True)


@pytest.mark.parametrize("summary", SUMMARIES)
def test_summary_is_nan_until_a_task_has_weight(summary):
    metric = feed(summary([0.0, 1.0, 1.0]), {(0, 0): 2})
    assert metric.compute().isnan()


def test_acc_is_nan_if_a_task_with_weight_was_not_measured():
    cells = {cell: right for cell, right in RIGHT.items() if cell != (2, 1)}
    assert feed(WeightedAccuracy(), cells).compute().isnan()
    assert feed(WeightedAccuracy([1.0, 0.0, 1.0]), cells).compute() == 0.375


@pytest.mark.parametrize("summary", SUMMARIES)
def test_summary_is_nan_before_the_first_update(summary):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert summary([1.0, 2.0]).compute().isnan()


@pytest.mark.parametrize("summary", SUMMARIES)
def test_more_weights_than_tasks_so_far_are_allowed(summary):
    value = feed(summary([2, 1, 1, 7]), RIGHT).compute()
    assert value.item() == pytest.approx(BY_HAND[summary][2, 1, 1])


@pytest.mark.parametrize("summary", SUMMARIES)
def test_fewer_weights_than_tasks_raise(summary):
    with pytest.raises(ValueError, match="Got 2 utility weights for 3 tasks"):
        feed(summary([1.0, 1.0]), RIGHT).compute()


@pytest.mark.parametrize("summary", SUMMARIES)
def test_invalid_weights_raise_before_the_stream(summary):
    with pytest.raises(ValueError, match="weight -1.0 at index 1"):
        summary([1.0, -1.0])


@pytest.mark.parametrize("summary", SUMMARIES)
def test_merge_state_adds_copies_that_saw_different_tasks(summary):
    first = feed(summary((2, 1, 1)), {cell: right for cell, right in RIGHT.items() if cell[0] < 2})
    second = feed(summary((2, 1, 1)), {cell: right for cell, right in RIGHT.items() if cell[0] == 2})
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(BY_HAND[summary][2, 1, 1])


@pytest.mark.parametrize("summary", SUMMARIES)
def test_pickled_copy_keeps_counts_and_weights(summary):
    copy = pickle.loads(pickle.dumps(feed(summary((2, 1, 1)), RIGHT)))
    assert copy.compute().item() == pytest.approx(BY_HAND[summary][2, 1, 1])


def test_collection_updates_matrix_and_summaries_together():
    collection = MetricCollection([AccuracyMatrix(), *(summary((2, 1, 1)) for summary in SUMMARIES)])
    values = feed(collection, RIGHT).compute()
    assert values["AccuracyMatrix"].shape == (3, 3)
    for summary in SUMMARIES:
        assert values[summary.__name__].item() == pytest.approx(BY_HAND[summary][2, 1, 1])


@pytest.mark.parametrize("summary", SUMMARIES)
def test_plot_shows_one_value_or_a_series(summary):
    metric = feed(summary(), RIGHT)
    fig, ax = metric.plot()
    assert isinstance(fig, plt.Figure)
    assert ax.lines[0].get_ydata() == pytest.approx([metric.compute().item()])
    _, ax = metric.plot([tensor(0.5), tensor(0.25)])
    assert ax.lines[0].get_ydata() == pytest.approx([0.5, 0.25])

import pickle

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lightning_odem.metrics import WeightedForwardTransfer, forward_transfer

TARGET = tensor([0, 1, 2, 3])
# Right answers out of 4, per task.
BASE = [3, 1, 2, 0]
BEFORE_TRAINING = [None, 3, 1, 4]


def feed(metric, merge, task, right):
    metric.update(torch.where(torch.arange(4) < right, TARGET, TARGET + 1), TARGET, merge=merge, task=task)


def measured_stream(weights=None):
    metric = WeightedForwardTransfer(weights)
    for task in range(4):
        feed(metric, merge=-1, task=task, right=BASE[task])
        if task:
            feed(metric, merge=task - 1, task=task, right=BEFORE_TRAINING[task])
    return metric


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(None, (0.5 - 0.25 + 1.0) / 3), ([9, 2, 1, 1], (2 * 0.5 - 0.25 + 1.0) / 4), ([0, 0, 0, 1], 1.0)],
)
def test_fwt_of_hand_worked_stream(weights, expected):
    value = measured_stream(weights).compute()
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(expected)


def test_fwt_is_the_function_of_the_two_accuracies():
    baseline, before_training = tensor(BASE).double() / 4, tensor([torch.nan, *BEFORE_TRAINING[1:]]).double() / 4
    expected = forward_transfer(before_training, baseline, tensor([1.0, 2.0, 3.0, 4.0]))
    assert_close(measured_stream([1, 2, 3, 4]).compute(), expected)


def test_base_model_may_be_measured_on_the_whole_stream_beforehand():
    metric = WeightedForwardTransfer([1.0, 1.0, 1.0, 1.0])
    for task in range(4):
        feed(metric, merge=-1, task=task, right=BASE[task])
    assert metric.compute().isnan()
    feed(metric, merge=0, task=1, right=3)
    assert metric.compute() == 0.5
    feed(metric, merge=1, task=2, right=1)
    assert metric.compute() == (0.5 - 0.25) / 2


def test_fwt_is_nan_for_the_first_task():
    metric = WeightedForwardTransfer()
    feed(metric, merge=-1, task=0, right=3)
    assert metric.compute().isnan()


def test_fwt_is_nan_without_the_base_model():
    metric = WeightedForwardTransfer()
    feed(metric, merge=0, task=1, right=3)
    assert metric.compute().isnan()


def test_fwt_is_nan_before_the_first_update():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert WeightedForwardTransfer([1.0]).compute().isnan()


@pytest.mark.parametrize(("merge", "task"), [(0, 0), (1, 0), (1, 1), (0, 2), (-2, 0), (-2, -1), (-1, -1)])
def test_merge_that_is_neither_base_nor_before_training_raises(merge, task):
    with pytest.raises(ValueError, match=f"got merge {merge} and task {task}"):
        feed(WeightedForwardTransfer(), merge=merge, task=task, right=4)


def test_fewer_weights_than_tasks_raise():
    with pytest.raises(ValueError, match="Got 3 utility weights for 4 tasks"):
        measured_stream([1.0, 1.0, 1.0]).compute()


def test_merge_state_adds_base_model_and_merged_models():
    base, merged = WeightedForwardTransfer(), WeightedForwardTransfer()
    for task in range(4):
        feed(base, merge=-1, task=task, right=BASE[task])
    for task in range(1, 3):
        feed(merged, merge=task - 1, task=task, right=BEFORE_TRAINING[task])
    base.merge_state(merged)
    assert base.compute() == (0.5 - 0.25) / 2


def test_reset_and_pickle_keep_the_weights():
    metric = pickle.loads(pickle.dumps(measured_stream([9, 2, 1, 1])))
    assert metric.compute() == (2 * 0.5 - 0.25 + 1.0) / 4
    metric.reset()
    feed(metric, merge=-1, task=1, right=0)
    feed(metric, merge=0, task=1, right=1)
    assert metric.compute() == 0.25

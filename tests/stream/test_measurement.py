import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toy import Classifier, Incoming, Task, fit

from lightning_odem import ContinualMergeCallback


def data_with_accuracy(module, inputs, fraction):
    """Labelled samples of which the module gets the given fraction right."""
    with torch.no_grad():
        labels = module.eval()(inputs).argmax(1)
    wrong = round(len(inputs) * (1 - fraction))
    labels[:wrong] = (labels[:wrong] + 1) % 3
    return DataLoader(TensorDataset(inputs, labels), batch_size=4)


def test_data_given_by_the_user_comes_before_the_datamodules(tmp_path):
    module, merge, incoming = Classifier(), ContinualMergeCallback("average", dirpath=str(tmp_path / "a")), Incoming()
    merge.evaluation_data["task_1"] = DataLoader(TensorDataset(torch.zeros(4, 4), torch.full((4,), 2)), batch_size=2)
    fit(module, Task(0), incoming, merge)
    predicted = int(module.eval()(torch.zeros(1, 4)).argmax())
    assert merge.report.accuracy == [[float(predicted == 2)]]


def test_tasks_merged_elsewhere_are_measured_on_data_given_for_them(tmp_path):
    module, first = Classifier(), ContinualMergeCallback("average", dirpath=str(tmp_path / "a"))
    fit(module, Task(0), first)
    second = ContinualMergeCallback("average", dirpath=str(tmp_path / "b"))
    second.load_state_dict(first.state_dict())
    second.evaluation_data["task_1"] = data_with_accuracy(module, torch.randn(8, 4), 0.5)
    fit(module, Task(1, weight=0.0), second)
    # Weight 0 leaves the merged model as it was, so half of the first task's samples are right.
    assert second.report.accuracy[1][0] == 0.5


def test_tasks_merged_elsewhere_without_data_are_named_in_a_warning(tmp_path):
    module, first = Classifier(), ContinualMergeCallback("average", dirpath=str(tmp_path / "a"))
    fit(module, Task(0), first)
    second = ContinualMergeCallback("average", dirpath=str(tmp_path / "b"))
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="task_1 will be NaN.*evaluation_data"):
        fit(module, Task(1), second)
    assert math.isnan(second.report.accuracy[1][0])
    assert not math.isnan(second.report.accuracy[1][1])

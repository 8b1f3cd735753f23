"""What is measured, and where it goes."""

import csv
import json
import logging
import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from toy import Classifier, Incoming, Task, accuracy, everything, fit, make_trainer

from lightning_odem import ContinualMergeCallback
from lightning_odem.report import StreamReport
from lightning_odem.report.scalars import latest_scalars

pytestmark = pytest.mark.usefixtures("small_stream")


class Watched:
    """A stream of three tasks with every model on its way kept."""

    def __init__(self, merge, trainer_options=None, task_options=None):
        self.module, self.merge, self.incoming = Classifier(batch_norm=True), merge, Incoming()
        self.tasks = [Task(number, **(task_options or {})) for number in range(3)]
        self.base, self.merged, self.callback_metrics = everything(self.module), [], []
        for task in self.tasks:
            trainer = fit(self.module, task, self.incoming, merge, **(trainer_options or {}))
            self.merged.append(everything(self.module))
            self.callback_metrics.append({key: value.item() for key, value in trainer.callback_metrics.items()})

    def accuracy(self, state, number):
        module = Classifier(batch_norm=True)
        module.load_state_dict(state)
        return accuracy(module, self.tasks[number].test_set)


@pytest.fixture
def stream():
    return Watched(ContinualMergeCallback(weights=[1.0, 2.0, 5.0]))


def test_accuracies_are_those_of_the_models_at_each_point_of_the_stream(stream):
    report = stream.merge.report
    assert report.accuracy == [[stream.accuracy(stream.merged[k], i) for i in range(k + 1)] for k in range(3)]
    assert report.fine_tuned == [stream.accuracy(stream.incoming.models[k], k) for k in range(3)]
    assert report.pretrained == [stream.accuracy(stream.base, k) for k in range(3)]
    assert math.isnan(report.before_training[0])
    assert report.before_training[1:] == [stream.accuracy(stream.merged[k - 1], k) for k in (1, 2)]


def test_acc_and_bwt_are_the_weighted_means_of_the_accuracy_matrix(stream):
    report, weights = stream.merge.report, [1.0, 2.0, 5.0]
    last = report.accuracy[2]
    assert report.acc() == pytest.approx(sum(w * a for w, a in zip(weights, last, strict=True)) / 8)
    moved = [last[i] - report.accuracy[i][i] for i in range(2)]
    assert report.bwt() == pytest.approx((1.0 * moved[0] + 2.0 * moved[1]) / 3)
    assert math.isnan(report.bwt(0))


def test_the_trainers_callback_metrics_hold_the_merge(stream):
    metrics = stream.callback_metrics[2]
    report = stream.merge.report
    expected = latest_scalars(report)
    assert metrics.items() >= {name: pytest.approx(value) for name, value in expected.items()}.items()
    assert {"merge/acc", "merge/bwt", "merge/acc/task_1", "merge/t", "merge/loss_after"} <= metrics.keys()
    assert "merge/bwt" not in stream.callback_metrics[0]
    assert "loss" in metrics  # the training's own metrics stay


def test_loggers_get_every_merge_at_the_number_of_its_task(tmp_path):
    merge, module = ContinualMergeCallback(), Classifier()
    for number in range(3):
        fit(module, Task(number), merge, logger=CSVLogger(tmp_path, version=number), log_every_n_steps=1)
        with open(tmp_path / "lightning_logs" / f"version_{number}" / "metrics.csv") as file:
            (row,) = [row for row in csv.DictReader(file) if row["merge/acc"]]
        assert int(row["step"]) == number + 1
        assert float(row["merge/acc"]) == pytest.approx(merge.report.acc())
        found = {name for name, value in row.items() if name.startswith("merge/") and value}
        assert found == latest_scalars(merge.report).keys()


def test_several_loggers_and_one_trainer_get_them_all(tmp_path):
    merge, module = ContinualMergeCallback(), Classifier()
    loggers = [CSVLogger(tmp_path, name=name) for name in "ab"]
    trainer = make_trainer(merge, logger=loggers, log_every_n_steps=1)
    for number in range(2):
        trainer.fit(module, datamodule=Task(number))
    for logger in loggers:
        with open(f"{logger.log_dir}/metrics.csv") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows if row["merge/acc"]] == [1, 2]
        assert [int(row["step"]) for row in rows if row["loss"]] == list(range(12))


def test_the_run_directory_holds_report_and_checkpoints(stream):
    directory = stream.merge.dirpath
    assert directory.name == "version_0"
    loaded = StreamReport.load(directory / "report.json")
    assert loaded.as_dict()["accuracy"] == stream.merge.report.accuracy
    assert json.loads((directory / "report.json").read_text())["acc"][2] == pytest.approx(stream.merge.report.acc())
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["merged-01-task_1.ckpt", "merged-02-task_2.ckpt", "merged-03-task_3.ckpt", "report.json", "stream"]


def test_the_table_names_every_task(stream):
    table = stream.merge.table(width=120)
    for word in ("task_1", "task_2", "task_3", "pretrained", "fine-tuned", "ACC_w", "BWT_w"):
        assert word in table


def test_the_table_of_a_new_callback_says_that_there_is_nothing_yet():
    assert ContinualMergeCallback().table(80) == "No merge yet.\n"


def test_one_line_says_what_the_merge_came_to(caplog):
    merge, module = ContinualMergeCallback(), Classifier()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        for number in range(2):
            fit(module, Task(number), merge)
    (line,) = [message for message in caplog.messages if message.startswith("Merged task 2")]
    report = merge.report
    assert f"Merged task 2 (task_2) at t = 0.5 in {report.merges[1].merge_seconds:.1f} s" in line
    assert f"s, measured in {report.merges[1].evaluation_seconds:.1f} s, " in line
    assert f"ACC {100 * report.acc():.1f} %, BWT {100 * report.bwt():.1f}" in line
    assert f"loss {report.merges[1].loss_before:.4g} -> {report.merges[1].loss_after:.4g}" in line
    scale = latest_scalars(report)["merge/scale"]
    assert (f"scale {scale:.3g}" if scale else "the running average") in line
    path = report.merges[1].path
    assert f"{path['descent_taken'][0]:.0f} of {len(path['descent_loss']) - 1} pieces of descent" in line


def test_validation_data_given_to_fit_serve_where_there_is_no_test_data():
    merge, module, task = ContinualMergeCallback(), Classifier(), Task(0)
    loader = DataLoader(task.test_set, batch_size=5)
    make_trainer(merge).fit(module, DataLoader(task.train_set, batch_size=8), loader)
    assert merge.report.fine_tuned == [accuracy(module, task.test_set)]


def test_a_task_without_any_data_to_measure_on_warns_and_has_no_accuracy():
    merge, module, task = ContinualMergeCallback(), Classifier(), Task(0)
    with pytest.warns(UserWarning, match="'task_1' has no test or validation data: its accuracies will be NaN"):
        make_trainer(merge).fit(module, DataLoader(task.train_set, batch_size=8))
    assert math.isnan(merge.report.fine_tuned[0])
    assert math.isnan(merge.report.accuracy[0][0])
    assert "merge/acc" not in latest_scalars(merge.report)


def test_limit_test_batches_limits_what_is_measured():
    merge, module, task = ContinualMergeCallback(), Classifier(), Task(0)
    fit(module, task, merge, limit_test_batches=1)
    inputs, targets = task.test_set.tensors
    with torch.no_grad():
        expected = (module(inputs[:5]).argmax(1) == targets[:5]).double().mean().item()
    assert merge.report.fine_tuned == [expected]

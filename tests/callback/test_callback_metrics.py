"""Tasks that bring their metric: what is measured, reported and shown of them."""

import logging
import math

import pytest
import torch
from measured import Data, Net, Texts, Tokens, labels, positive, total
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MultilabelAUROC
from torchmetrics.functional import r2_score
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.text import Perplexity
from toy import Classifier, Incoming, Task, fit, same, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.metrics import ACCURACY, TaskMetric
from lightning_odem.report import StreamReport

pytestmark = pytest.mark.usefixtures("small_stream")

bce = F.binary_cross_entropy_with_logits


class With(Net):
    """A module that knows the metric of its tasks."""

    def __init__(self, metric, **settings):
        super().__init__(**settings)
        self.make = metric

    def task_metric(self, task):
        return self.make()


def stream(module, *tasks, method="average", **options):
    merge = ContinualMergeCallback(method, **options)
    for task in tasks:
        trainer = fit(module, task, merge)
    return merge, trainer


@torch.no_grad()
def outputs(module, task):
    inputs, targets = task.test_set.tensors
    return module.eval()(inputs), targets


@pytest.mark.parametrize("squeeze", [False, True], ids=["[B, 1]", "[B]"])
@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_a_regression_is_measured_by_r2(squeeze, owner):
    module = With(R2Score, squeeze=squeeze) if owner == "module" else Net(squeeze=squeeze)
    tasks = [Data(number, total, None if owner == "module" else lambda task: R2Score()) for number in range(2)]
    merge, trainer = stream(module, *tasks)
    expected = []
    for task in tasks:
        found, targets = outputs(module, task)
        expected.append(r2_score(found.reshape(-1), targets).item())
    assert merge.report.accuracy[1] == pytest.approx(expected, abs=1e-5)
    assert merge.report.metrics == {name: TaskMetric("R2Score", "", True) for name in ("task_1", "task_2")}
    assert all(math.isfinite(value) for value in merge.report.pretrained)
    assert trainer.callback_metrics["merge/R2Score/task_2"] == pytest.approx(expected[1], abs=1e-5)
    assert trainer.callback_metrics["merge/R2Score"] == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert not any(name.startswith("merge/acc") for name in trainer.callback_metrics)


def test_a_single_logit_is_measured_by_binary_f1_on_float_targets():
    module, task = With(BinaryF1Score, loss=bce), Data(0, positive)
    merge, trainer = stream(module, task)
    found, targets = outputs(module, task)
    metric = BinaryF1Score()
    metric.update(found.flatten(), targets.long())
    assert merge.report.accuracy == [[pytest.approx(metric.compute().item())]]
    assert merge.report.metric() == TaskMetric("BinaryF1Score", "%", True)
    assert "BinaryF1Score (%)" in merge.table(100)


def test_several_labels_are_measured_by_auroc():
    module, task = With(lambda: MultilabelAUROC(3), outputs=3, loss=bce), Data(0, labels)
    merge, _ = stream(module, task)
    found, targets = outputs(module, task)
    metric = MultilabelAUROC(3)
    metric.update(found, targets.long())
    assert merge.report.accuracy == [[pytest.approx(metric.compute().item())]]


def test_where_lower_is_better_a_negative_bwt_still_means_forgotten():
    module = Tokens()
    module.task_metric = lambda task: Perplexity()
    merge, trainer = stream(module, Texts(1), Texts(3))
    (first,), (now, _) = merge.report.accuracy
    assert now > first  # the second task has spoilt the first
    assert merge.report.bwt() == pytest.approx(first - now)
    assert merge.report.forgetting() == pytest.approx(now - first)
    assert trainer.callback_metrics["merge/bwt"] < 0
    assert "Perplexity (lower is better)" in merge.table(100)


def test_of_a_collection_the_first_entry_is_the_score_and_the_others_are_kept(tmp_path):
    module, task = With(lambda: MetricCollection([R2Score(), MeanAbsoluteError()])), Data(0, total)
    merge, trainer = stream(module, task, Data(1, total))
    error = (outputs(module, task)[0].flatten() - task.test_set.tensors[1]).abs().mean().item()
    assert merge.report.metric().name == "R2Score"
    last = merge.report.merges[-1].further
    assert set(last) == {"task_1", "task_2"}
    assert last["task_1"] == {"MeanAbsoluteError": pytest.approx(error)}
    assert trainer.callback_metrics["merge/MeanAbsoluteError/task_1"] == pytest.approx(error)
    assert repr(StreamReport.load(merge.report.save(tmp_path / "report.json"))) == repr(merge.report)


def test_a_metric_that_the_module_uses_itself_is_left_alone():
    module = Net()
    module.score = R2Score()
    module.task_metric = lambda task: module.score
    stream(module, Data(0, total))
    assert module.score.update_count == 0
    assert module.score.sync_on_compute


def test_unlike_metrics_have_no_mean_and_the_table_says_why(caplog):
    tasks = [Data(0, total, lambda task: R2Score()), Data(1, total, lambda task: MeanSquaredError())]
    with caplog.at_level(logging.INFO):
        merge, trainer = stream(Net(), *tasks)
    assert merge.report.acc(0) == merge.report.accuracy[0][0]
    assert math.isnan(merge.report.acc())
    assert math.isnan(merge.report.bwt())
    text = " ".join(merge.table(100).split())
    assert "unlike metrics, R2Score, MeanSquaredError (lower is better)" in text
    assert {"merge/R2Score/task_1", "merge/MeanSquaredError/task_2"} <= trainer.callback_metrics.keys()
    assert "no ACC and BWT of unlike metrics" in caplog.text


def test_the_line_of_each_merge_names_the_metric(caplog):
    with caplog.at_level(logging.INFO):
        merge, _ = stream(With(R2Score), Data(0, total))
    score = ACCURACY if merge.report.metric() is None else merge.report.metric()
    assert f"ACC (R2Score) {score.text(merge.report.acc())}" in caplog.text
    assert "%" not in caplog.text.split("Merged task 1")[1].split("Merged weights")[0]


def test_class_accuracy_needs_no_metric_and_is_not_in_the_report():
    merge, trainer = stream(Classifier(), Task(0))
    assert merge.report.metrics == {}
    assert merge.report.as_dict()["merges"][0]["further"] == {}
    assert {"merge/acc", "merge/acc/task_1", "merge/fine_tuned_acc"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda: MulticlassAccuracy(3, average=None), r"score of a task is one number.*\[3\].*average=\"macro\""),
        (lambda: "r2", r"task_metric\('task_1'\) of .*gives a torchmetrics.Metric.*got 'r2'"),
        (lambda: MetricCollection([]), "task_metric"),
        (lambda: MultilabelAUROC(3), r"cannot be measured by MultilabelAUROC, got float32 \[5, 3\] and targets int64"),
    ],
)
def test_what_gives_no_score_is_refused_before_training(metric, message):
    module, incoming = Classifier(), Incoming()
    module.task_metric = lambda task: metric()
    before = weights(module)
    with pytest.raises(ValueError, match=message):
        fit(module, Task(0), incoming, ContinualMergeCallback("average"))
    assert incoming.batches == 0
    assert same(weights(module), before)


def test_without_a_metric_a_regression_is_refused_with_the_remedies():
    with pytest.raises(ValueError, match=r"task_metric\(task\) .*R2Score\(\).*evaluate=False"):
        stream(Net(), Data(0, total))


@pytest.mark.parametrize("step", [1, 3])
def test_a_metric_that_a_few_samples_cannot_decide_is_not_refused(step):
    """R2 of a single sample is undefined; data given later for an earlier task are looked at by their first batch."""
    merge, module = ContinualMergeCallback("average"), With(R2Score)
    fit(module, Data(0, total), merge)
    inputs, targets = Data(0, total).test_set.tensors
    merge.evaluation_data["task_1"] = list(zip(inputs.split(step), targets.split(step), strict=True))
    fit(module, Data(1, total), merge)
    assert math.isfinite(merge.report.accuracy[1][0])


def test_a_task_keeps_its_metric_in_another_process(tmp_path):
    directory = str(tmp_path / "run")
    tasks = [Data(number, total, lambda task: R2Score()) for number in range(2)]
    module = Net()
    base = weights(module)
    fit(module, tasks[0], ContinualMergeCallback("average", dirpath=directory))

    def again():
        module.load_state_dict(base)
        return ContinualMergeCallback("average", dirpath=directory)

    merge = again()
    assert merge.report.metrics == {"task_1": TaskMetric("R2Score", "", True)}
    merge.evaluation_data["task_1"] = tasks[0].test_dataloader()
    module.prediction_step = lambda batch, task: (module(batch[0]).flatten().long(), batch[1].long())
    with pytest.raises(ValueError, match=r"was measured by R2Score and would now be by accuracy \(%\)"):
        fit(module, tasks[1], merge)
    del module.prediction_step
    merge = again()
    for task in merge.remaining(tasks):
        fit(module, task, merge)
    assert all(math.isfinite(value) for value in merge.report.accuracy[1])


def test_evaluate_false_measures_nothing_and_asks_for_nothing():
    class Unmeasurable(Data):
        def test_dataloader(self):
            raise AssertionError("there is nothing to measure")

    merge, trainer = stream(Net(), Unmeasurable(0, total), Unmeasurable(1, total), evaluate=False)
    report = merge.report
    measured = [*report.accuracy[1], *report.pretrained, *report.fine_tuned, *report.before_training, report.acc()]
    assert all(map(math.isnan, measured))
    assert not any("acc" in name for name in trainer.callback_metrics)
    assert "—" in merge.table(100)


def test_a_limit_of_no_test_batch_measures_nothing_with_a_warning():
    merge = ContinualMergeCallback("average")
    with pytest.warns(UserWarning, match="limit_test_batches is 0"):
        fit(Net(), Data(0, total), merge, limit_test_batches=0)
    assert math.isnan(merge.report.acc())


def test_a_task_taken_out_takes_its_metric_along():
    module, incoming = With(lambda: MetricCollection([R2Score(), MeanAbsoluteError()])), Incoming()
    merge = ContinualMergeCallback("average")
    for number in range(2):
        fit(module, Data(number, total), incoming, merge)
    merge.remove("task_1", incoming.models[0])
    assert set(merge.report.metrics) == set(merge.report.merges[-1].further) == {"task_2"}


def test_scores_are_measured_in_the_validating_state(small_stream):
    class Augmented(Task):
        """Its training batches are noise."""

        def on_after_batch_transfer(self, batch, dataloader_idx):
            inputs, targets = batch
            return (torch.randn_like(inputs) if self.trainer.training else inputs), targets

    module, merge = Classifier(), ContinualMergeCallback("average")
    trainer = fit(module, Augmented(0), merge)
    inputs, targets = Augmented(0).test_set.tensors
    with torch.no_grad():
        expected = (module.eval()(inputs).argmax(1) == targets).double().mean().item()
    assert merge.report.accuracy[0][0] == pytest.approx(expected)
    assert merge.report.fine_tuned[0] == pytest.approx(expected)
    assert not trainer.validating

"""What the README shows as code is run."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from measured import Data, Net, total
from toy import Classifier, Task, Watching, fit

from lightning_odem import ContinualMergeCallback, ContinualTrainer, TaskClassifier
from lightning_odem.methods import METHODS

ROOT = Path(__file__).parents[1]
README, EXTENDING = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/extending.md"))
GUIDES = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "guides").glob("*.md")))


def block_with(text):
    blocks = re.findall(r"```python\n(.*?)```", README + GUIDES + EXTENDING, re.DOTALL)
    return next(block for block in blocks if text in block)


@pytest.mark.parametrize("text", ["def overshoot", "class DescendingAverage"])
def test_rules_of_ones_own_merge(text, small_stream):
    shown = {}
    exec(block_with(text), shown)
    try:
        merge = shown.get("merge") or ContinualMergeCallback(method=shown["DescendingAverage"]())
        module = Classifier()
        for number in range(2):
            fit(module, Task(number), merge)
        assert merge.report.merges[1].sample_gradients == (48 if text.startswith("class") else 0)
    finally:
        METHODS.pop("overshoot", None)


def test_a_need_of_ones_own_is_met(small_stream):
    shown = {}
    exec(block_with("(Need)"), shown)
    seen, method = [], Watching(shown["MeanOfRun"]())

    class Recorded(Classifier):
        def on_train_batch_end(self, *_):
            seen.append(torch.nn.utils.parameters_to_vector(self.parameters()).detach())

    fit(Recorded(), Task(0), ContinualMergeCallback(method))
    torch.testing.assert_close(method.contexts[0][shown["MeanOfRun"]], torch.stack(seen).mean(0))


def test_samples_without_labels_do(small_stream):
    shown = {"images": Task(0).train_set.tensors[0]}
    exec(block_with("images"), shown)
    merge, module = shown["merge"], Classifier()
    for number, name in enumerate(["digits", "letters"]):
        fit(module, Task(number, name), merge)
    assert merge.report.merges[1].gradient_evaluations in (1, 2)  # a second piece only if the first helps
    held = merge.state_dict()["buffer"]["tasks"]
    assert held["digits"]["samples"].shape == (24, 4)
    assert [samples["logits"].shape for samples in held.values()] == [(24, 3), (24, 3)]


def test_a_regression_is_measured_by_the_metric_it_brings(small_stream):
    shown = {"Regression": Net}
    exec(block_with("R2Score()"), shown)
    merge = ContinualMergeCallback("average")
    fit(shown["Prices"](), Data(0, total), merge)
    assert merge.table(80).startswith("R2Score\n")


def test_a_metric_of_ones_own_is_shown_in_percent(small_stream):
    shown = {}
    exec(block_with("class Within"), shown)

    class Prices(Net):
        def task_metric(self, task):
            return shown["Within"](0.5)

    merge = ContinualMergeCallback("average")
    fit(Prices(), Data(0, total), merge)
    assert merge.table(80).startswith("Within (%)\n")
    assert 0.0 <= merge.report.accuracy[0][0] <= 1.0


@pytest.mark.slow
def test_a_family_of_tasks_of_ones_own_is_merged(small_stream):
    shown = {}
    exec(block_with("class Blobs"), shown)
    model = TaskClassifier("test_vit", backbone_args={"in_chans": 1, "img_size": 32})
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = ContinualTrainer(max_epochs=1, callbacks=[ContinualMergeCallback("average")], **options)
    report = trainer.fit_tasks(model, shown["Blobs"](batch_size=16))
    assert report.tasks == ["size_4", "size_8"]


def test_the_flow_runs_by_itself():
    shown = {}
    exec(block_with("integrate("), shown)
    assert len(shown["path"].gamma) == 10


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_table(name):
    table = README[README.index("## Merge methods") : README.index("### A rule of your own")]
    assert f"`{name}`" in table


def test_a_script_goes_on_with_its_stream_when_started_again(small_stream):
    block = block_with("merge.remaining").replace("model = ...", "model = Classifier()")
    counts = []
    for count in (1, 3, 3):
        shown = {"L": L, "ContinualMergeCallback": ContinualMergeCallback, "Classifier": Classifier}
        shown |= {"tasks": [Task(number) for number in range(count)]}
        exec(block, shown)
        counts.append(len(shown["merge"].report.tasks))
        shown["merge"].load_task(Classifier(), "task_1")
    assert counts == [1, 3, 3]
    assert Path("streams/shop/report.json").exists()

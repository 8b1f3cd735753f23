"""Which tasks are measured after a merge, and on which data."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from toy import Classifier, Task, accuracy, fit, make_trainer

from lightning_odem import ContinualMergeCallback
from lightning_odem.report import StreamReport, save

pytestmark = pytest.mark.usefixtures("small_stream")


def measured(merge):
    """Which entries of the accuracy matrix were measured."""
    return [[not math.isnan(value) for value in row] for row in merge.report.accuracy]


def stream(evaluate, tasks, fitted=None):
    module, merge = Classifier(), ContinualMergeCallback("average", evaluate=evaluate)
    for task in (fitted or merge.remaining)(tasks):
        trainer = fit(module, task, merge)
    return module, merge, trainer


def test_after_every_nth_merge_all_tasks_are_measured_and_otherwise_the_merged_one():
    module, merge, _ = stream(2, [Task(number) for number in range(4)], fitted=list)
    assert measured(merge) == [[True], [True, True], [False, False, True], [True, True, True, True]]
    assert merge.report.accuracy[3] == [accuracy(module, Task(number).test_set) for number in range(4)]
    every = stream("every", [Task(number) for number in range(4)])[1]
    assert (merge.report.acc(), merge.report.bwt()) == (every.report.acc(), every.report.bwt())


@pytest.mark.parametrize("evaluate", ["last", 4])
def test_after_the_last_of_the_remaining_tasks_all_are_measured(evaluate):
    _, merge, trainer = stream(evaluate, (Task(number) for number in range(3)))
    assert measured(merge) == [[True], [False, True], [True, True, True]]
    assert math.isfinite(merge.report.bwt())
    assert trainer.callback_metrics["merge/bwt"] == pytest.approx(merge.report.bwt())


def test_what_was_not_measured_is_a_dash_and_the_figures_are_drawn(tmp_path):
    _, merge, _ = stream(3, [Task(number) for number in range(3)], fitted=list)
    row = next(line for line in merge.table().splitlines() if line.startswith("after task_2"))
    assert row.split()[2] == "—"
    assert StreamReport.load(merge.dirpath / "report.json").accuracy[1][1] == merge.report.accuracy[1][1]
    save(merge.report, tmp_path)
    assert {path.name for path in tmp_path.glob("acc*.png")} == {"accuracy_matrix.png", "accuracy_over_stream.png"}


@pytest.mark.parametrize("evaluate", [0, -1, True, "never", 1.5])
def test_another_choice_is_refused(evaluate):
    with pytest.raises(ValueError, match="evaluate is 'every'"):
        ContinualMergeCallback(evaluate=evaluate)


def test_of_several_validation_loaders_a_task_is_measured_on_its_own():
    """Every fit watches the validation data of all tasks, as in a dict by name."""
    tasks = {name: Task(number, name) for number, name in enumerate(("first", "second"))}
    watched = {name: task.val_dataloader() for name, task in tasks.items()}

    class Watching(Task):
        test_dataloader = L.LightningDataModule.test_dataloader

        def val_dataloader(self):
            return watched

    class Net(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    module, merge = Net(), ContinualMergeCallback("average")
    for number, name in enumerate(tasks):
        fit(module, Watching(number, name), merge)
    assert merge.report.accuracy[1] == [accuracy(module, task.test_set) for task in tasks.values()]


@pytest.mark.parametrize("monitor", [None, "val_loss/dataloader_idx_0"])
def test_of_several_unnamed_loaders_the_user_says_which_or_it_is_refused_before_training(monitor):
    loaders = [Task(number).val_dataloader() for number in range(2)]

    class Net(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    module = Net()
    before = module.head.weight.clone()
    with pytest.raises(ValueError, match=r"has 2 validation dataloaders, 0, 1, .*evaluation_data\['task_1'\]"):
        make_trainer(ContinualMergeCallback("average")).fit(module, Task(0).train_dataloader(), loaders)
    assert torch.equal(before, module.head.weight)
    merge = ContinualMergeCallback("average", evaluation_data={"task_1": 0, "task_2": 1})
    for number in range(2):
        make_trainer(merge).fit(module, Task(number).train_dataloader(), loaders)
    assert merge.report.accuracy[1] == [accuracy(module, Task(number).test_set) for number in range(2)]


class Named(Task):
    def __init__(self, number: int = 0, name: str = "a"):
        super().__init__(number, name)


def test_one_fit_command_per_task_measures_all_tasks_with_data_of_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = f"{Named.__module__}.Named"
    (tmp_path / "config.yaml").write_text(
        f"""
seed_everything: 0
trainer:
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_odem.ContinualMergeCallback
      init_args:
        dirpath: stream
        evaluation_data:
          a: {{class_path: {module}, init_args: {{number: 0, name: a}}}}
          b: {{class_path: {module}, init_args: {{number: 1, name: b}}}}
"""
    )
    for number, name in enumerate("abc"):
        data = [f"--data.number={number}", f"--data.name={name}"]
        LightningCLI(Classifier, Named, args=["fit", "--config", "config.yaml", *data], save_config_callback=None)
    report = StreamReport.load("stream/report.json")
    assert report.tasks == ["a", "b", "c"]
    assert [all(map(math.isfinite, row)) for row in report.accuracy] == [True, True, True]
    assert math.isfinite(report.bwt())

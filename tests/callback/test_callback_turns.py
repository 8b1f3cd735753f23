"""Streams that several processes fit in one directory: at the same time, which is refused, or in turns."""

import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scripts import Script
from streams import process, tasks
from toy import Classifier, Failing, Task, fit

from lightning_odem import ContinualMergeCallback
from lightning_odem.stream.store import StreamInUseError

pytestmark = pytest.mark.usefixtures("small_stream")

FITTING = """
    import time
    import lightning as L
    from toy import Classifier, Task, fit
    from lightning_odem import ContinualMergeCallback

    class Waiting(L.Callback):
        def on_train_batch_end(self, *arguments):
            print("training", flush=True)
            time.sleep(60)

    fit(Classifier(), Task(0), ContinualMergeCallback(dirpath="run"), Waiting())
"""


@pytest.mark.slow
def test_a_second_process_is_refused_with_the_owner_named_until_the_first_has_ended():
    Path("fitting.py").write_text(textwrap.dedent(FITTING))
    other = Script("fitting.py")
    other.wait_for("training")
    merge = ContinualMergeCallback(dirpath="run")
    with pytest.raises(StreamInUseError, match=rf"in use by process {other.pid} on .* since"):
        fit(Classifier(), Task(0), merge)
    other.kill()
    other.wait()
    fit(Classifier(), Task(0), merge)
    assert merge.report.tasks == ["task_1"]


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_end", "on_train_end"])
def test_a_fit_that_fails_lets_others_go_on(hook):
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Classifier(), Task(0), ContinualMergeCallback(dirpath="run"), Failing(hook, RuntimeError("power cut")))
    fit(Classifier(), Task(1), ContinualMergeCallback(dirpath="run"))


def test_a_stream_that_another_process_took_further_is_read_again():
    module, first = process("run", stop_after=1)
    second = ContinualMergeCallback(dirpath="run", calibration_size=12)
    first_data = Task(0)
    second.evaluation_data["task_1"] = first_data
    fit(module, Task(1), second)
    fit(module, Task(2), first)
    assert first.report.tasks == ["task_1", "task_2", "task_3"]
    assert first.report.accuracy[1][0] == second.report.accuracy[1][0]
    assert first.report.merges[2].calibration.keys() == {"task_1", "task_2", "task_3"}


def test_a_task_that_another_process_merged_since_the_callback_was_made_is_not_given_again():
    late = ContinualMergeCallback(dirpath="run", calibration_size=12)
    process("run", stop_after=1)  # as another process would
    given = []
    for task in late.remaining(data := tasks()):
        given.append(task)
        fit(Classifier(dropout=0.2, batch_norm=True), task, late)
    assert given == data[1:]
    assert late.report.tasks == ["task_1", "task_2", "task_3"]


def test_a_task_that_another_process_merged_since_it_was_given_is_refused_before_training():
    late = ContinualMergeCallback(dirpath="run", calibration_size=12)
    first, second, third = tasks()
    remaining = late.remaining([first, second, third])
    assert next(remaining) is first
    process("run", stop_after=1)  # as another process would
    module = Classifier(dropout=0.2, batch_norm=True)
    with pytest.raises(ValueError, match="Task 'task_1' has been merged already"):
        fit(module, first, late)
    assert next(remaining) is second
    fit(module, second, late)
    assert late.report.tasks == ["task_1", "task_2"]


def test_names_belong_to_the_datamodules_they_were_given_to_whatever_their_order():
    merge = ContinualMergeCallback(dirpath="run", calibration_size=12)
    first, second, third = merge.remaining(tasks())
    module = Classifier(dropout=0.2, batch_norm=True)
    for task in (third, first):
        fit(module, task, merge)
    assert merge.report.tasks == ["task_3", "task_1"]


def test_processes_that_take_turns_keep_their_modules():
    callbacks = [ContinualMergeCallback(dirpath="run", calibration_size=12) for _ in range(2)]
    modules = [Classifier(dropout=0.2, batch_norm=True) for _ in range(2)]
    for number in range(4):
        fit(modules[number % 2], Task(number, f"task_{number}"), callbacks[number % 2])
    assert callbacks[1].report.tasks == [f"task_{number}" for number in range(4)]


def test_a_stream_that_was_put_in_the_place_of_another_is_refused():
    module, merge = process("run", stop_after=1)
    shutil.rmtree("run")
    with torch.random.fork_rng():
        other = Classifier(dropout=0.2, batch_norm=True)
        torch.nn.init.zeros_(other.head.bias)
        another = ContinualMergeCallback(dirpath="run", calibration_size=12)
        for task in tasks(2):
            fit(other, task, another)
    for _ in range(2):  # the second time as the first
        with pytest.raises(MisconfigurationException, match="holds another stream already"):
            fit(module, Task(1), merge)
    assert ContinualMergeCallback(dirpath="run").report.tasks == ["task_1", "task_2"]


def test_a_relative_directory_stays_where_it_was_when_the_callback_was_made(tmp_path, monkeypatch):
    merge = ContinualMergeCallback(dirpath="run", calibration_size=12)
    there = tmp_path / "elsewhere"
    there.mkdir()
    where = Path.cwd()
    monkeypatch.chdir(there)
    fit(Classifier(), Task(0), merge)
    assert merge.dirpath == where / "run"
    assert Path(merge.last_merged_path).exists()
    assert not list(there.iterdir())

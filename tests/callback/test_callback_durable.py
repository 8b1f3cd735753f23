"""Streams that go on in their directory: in a new process, under other settings."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from streams import process, tasks
from torch import nn
from toy import Classifier, Task, accuracy, everything, fit, make_trainer, same

from lightning_odem import ContinualMergeCallback
from lightning_odem.calibration import CalibrationOptions
from lightning_odem.report import StreamReport
from lightning_odem.stream.store import StreamStore

pytestmark = pytest.mark.usefixtures("small_stream")


@pytest.fixture(params=["auto", "ddp"])
def strategy(request):
    """A strategy for one process; what torch.distributed and Lightning leave behind is cleared away."""
    environment = dict(os.environ)
    yield request.param
    os.environ.clear()
    os.environ.update(environment)
    if dist.is_initialized():
        dist.destroy_process_group()


def plain(report):
    """A report but for the seconds and where its files are."""
    data = report.as_dict()
    for merge in data["merges"]:
        merge |= dict.fromkeys(("merge_seconds", "gradient_seconds", "evaluation_seconds", "checkpoint"))
    return json.dumps(data)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "opcm"},
        {"method": "ode_paper"},
        {"finetune_from": "merged"},
        {"offload": "disk"},
        {"weights": [1.0, 3.0, 2.0]},
        {"exclude": ["head"]},
    ],
    ids=["default", "method_with_state", "without_state", "from_merged", "on_disk", "weights", "own_heads"],
)
def test_a_new_process_goes_on_as_if_the_stream_had_never_stopped(options):
    module, whole = process("whole", **options)
    process("parts", stop_after=1, **options)
    process("parts", stop_after=1, **options)
    other, parts = process("parts", **options)
    assert same(everything(other), everything(module))
    assert plain(parts.report) == plain(whole.report)
    assert not any(math.isnan(value) for row in parts.report.accuracy for value in row)


@pytest.mark.parametrize("strategy", ["ddp"], indirect=True)
def test_where_lightning_sets_the_seed_anew_a_new_process_goes_on_as_well(strategy):
    module, _ = process("whole", strategy=strategy)
    for stop_after in (1, 1, None):
        other, _ = process("parts", stop_after=stop_after, strategy=strategy)
    assert same(everything(other), everything(module))


class Late(Classifier):
    """Built when Lightning asks for it, by random numbers; its head belongs to single tasks."""

    task_specific = ("head",)

    def __init__(self, merge):
        super().__init__(dropout=0.2, batch_norm=True)
        self.body = self.head = None
        self.merge = merge

    def configure_model(self):
        if self.body is None:
            built = Classifier(dropout=0.2, batch_norm=True)
            self.body, self.head = built.body, nn.Linear(8, 3)
            nn.init.normal_(self.body[0].weight)


@pytest.mark.parametrize("seeded", [True, False], ids=["built_by_the_seed", "load_base"])
def test_a_module_built_in_configure_model_goes_on_as_well(seeded, strategy):
    class Loading(Late):
        def on_fit_start(self):
            if self.merge.report.tasks and not seeded:
                with torch.no_grad():
                    self.body[0].weight.zero_()  # as from another file
                self.merge.load_base(self)

    def go(directory, stop_after=3):
        L.seed_everything(3, verbose=False)
        merge = ContinualMergeCallback(dirpath=directory, calibration_size=12)
        module = Loading(merge)
        for _, task in zip(range(stop_after), merge.remaining(tasks()), strict=False):
            fit(module, task, merge, strategy=strategy)
        return everything(module)

    whole = go("whole")
    go("parts", stop_after=1)
    go("parts", stop_after=1)
    assert same(go("parts"), whole)


def file_of(tensor):
    """Name of the file that a tensor is mapped from, or an empty one."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return Path(line[73:]).name
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's list of mappings")
def test_the_state_can_be_left_on_disk_without_a_change_of_results():
    on_cpu, merge = process("cpu")
    assert not file_of(merge.state_dict()["merged"]["body.0.weight"]).endswith(".safetensors")
    on_disk, merge = process("disk", offload="disk")
    assert same(everything(on_cpu), everything(on_disk))
    state = merge.state_dict()
    for section, tensor in (("base", "body.0.weight"), ("merged", "head.weight")):
        assert file_of(state[section][tensor]).startswith(f"{section}-")
    assert file_of(state["method"]["mean"]["body.0.weight"]).startswith("method-")
    assert file_of(state["buffer"]["tasks"]["task_1"]["samples"][0]).startswith("buffer-")
    process("disk", offload="disk", count=4)


def test_another_seed_of_the_new_process_is_heeded():
    first, _ = process("first")
    process("second", stop_after=2)
    other, _ = process("second", seed=4)
    assert not same(everything(other), everything(first))


def test_a_process_that_sets_seeds_between_tasks_is_left_alone():
    def seeded(directory, stop_after=3):
        L.seed_everything(0, verbose=False)
        module, merge = Classifier(dropout=0.5), ContinualMergeCallback(dirpath=directory)
        for done, task in enumerate(merge.remaining(tasks())):
            if done == stop_after:
                break
            L.seed_everything(17, verbose=False)
            fit(module, task, merge)
        return everything(module)

    whole = seeded("whole")
    seeded("parts", stop_after=2)
    assert same(seeded("parts"), whole)


def test_a_new_callback_shows_and_serves_the_stream_without_a_fit():
    module, merge = process("run")
    other = ContinualMergeCallback(dirpath="run", calibration_size=12)
    assert other.table(width=100) == merge.table(width=100)
    assert other.last_merged_path == merge.last_merged_path
    served = Classifier(dropout=0.2, batch_norm=True)
    other.load_task(served, "task_1")
    assert same(everything(served), everything(module))


def test_a_directory_that_was_moved_goes_on_where_it_is():
    module, _ = process("whole")
    process("old", stop_after=2)
    shutil.move("old", "new")
    other, merge = process("new")
    assert same(everything(other), everything(module))
    assert merge.dirpath == Path("new").absolute()
    assert not Path("old").exists()
    shutil.move("new", "newest")
    again = ContinualMergeCallback(dirpath="newest", calibration_size=12)
    assert again.last_merged_path == str(Path("newest/merged-03-task_3.ckpt").absolute())
    assert Path(again.last_merged_path).exists()


def test_another_base_model_is_refused_before_training_with_the_way_out():
    process("run", stop_after=1)
    files = sorted(Path("run").rglob("*"))
    module, merge = Classifier(dropout=0.2, batch_norm=True), ContinualMergeCallback(dirpath="run", calibration_size=12)
    with torch.no_grad():
        module.body[0].weight += 0.25
    before = everything(module)
    message = (
        r"run has another base model than Classifier \(1 of \d+ common tensors differs: body.0.weight by up to 0.25"
    )
    with pytest.raises(ValueError, match=message):
        fit(module, Task(1), merge)
    assert same(everything(module), before)
    assert sorted(Path("run").rglob("*")) == files
    merge.load_base(module)
    fit(module, Task(1), merge)
    assert merge.report.tasks == ["task_1", "task_2"]


def test_a_module_with_the_merged_weights_may_go_on():
    module, _ = process("run", stop_after=2)
    merge = ContinualMergeCallback(dirpath="run", calibration_size=12)
    fit(module, Task(2), merge)
    assert len(merge.report.tasks) == 3


def test_a_base_model_is_not_there_before_the_first_fit():
    with pytest.raises(ValueError, match="no base model yet"):
        ContinualMergeCallback().load_base(Classifier())


def test_a_report_that_tells_more_than_the_state_is_kept_beside_and_warned_of():
    process("run", count=2)
    told = Path("run/report.json").read_text()
    newest = max(Path("run/stream").glob("0*.json"))
    saved = newest.read_bytes()
    for name in ("report.json.ahead", "report.json.ahead.1"):
        newest.unlink()
        module, merge = Classifier(dropout=0.2, batch_norm=True), ContinualMergeCallback(dirpath="run")
        with pytest.warns(UserWarning, match=rf"state of the stream does not hold: task_2\..* kept as {name}\."):
            list(merge.remaining(tasks()))
        assert Path("run", name).read_text() == told
        assert StreamReport.load("run/report.json").tasks == ["task_1"]
        newest.write_bytes(saved)
        Path("run/report.json").write_text(told)
    newest.unlink()
    with pytest.warns(UserWarning, match="kept as report.json.ahead.2"):
        fit(module, Task(1), merge)
    assert StreamReport.load("run/report.json").tasks == ["task_1", "task_2"]


def test_what_remains_is_told_by_name():
    process("run", stop_after=1)
    merge = ContinualMergeCallback(dirpath="run", calibration_size=12)
    named = [Task(0), Task(1, "letters"), Task(2, "task_1")]
    assert list(merge.remaining(named)) == [named[1]]


def test_merged_tasks_are_measured_on_the_data_of_their_datamodules():
    process("run", stop_after=1)
    module, merge = Classifier(dropout=0.2, batch_norm=True), ContinualMergeCallback(dirpath="run", calibration_size=12)
    merge.evaluation_data["task_1"] = Task(0)
    fit(module, Task(1), merge)
    assert merge.report.accuracy[1] == [accuracy(module, Task(number).test_set) for number in range(2)]


def test_a_datamodule_given_for_measuring_is_set_up_once_and_draws_no_numbers():
    class Drawing(Task):
        setups = 0

        def setup(self, stage):
            self.setups += 1
            torch.rand(3)

    whole, _ = process("whole")
    process("run", stop_after=1)
    L.seed_everything(3, verbose=False)
    module = Classifier(dropout=0.2, batch_norm=True)
    merge = ContinualMergeCallback(dirpath="run", calibration_size=12)
    first = Drawing(0, "task_1", shuffle=True)
    for task in merge.remaining([first, *tasks()[1:]]):
        fit(module, task, merge)
    assert first.setups == 1
    assert same(everything(module), everything(whole))


def test_a_report_that_is_behind_the_state_is_written_again():
    _, merge = process("run")
    report = Path("run/report.json")
    expected = report.read_text()
    for damage in ("", "{}", json.dumps({**json.loads(expected), "tasks": []})):
        report.write_text(damage)
        list(ContinualMergeCallback(dirpath="run", calibration_size=12).remaining(tasks()))
        assert report.read_text() == expected
    assert StreamReport.load(report).tasks == merge.report.tasks


def test_a_state_that_cannot_be_written_leaves_the_stream_and_saves_the_fine_tuned_weights():
    module, merge = process("run", stop_after=1)
    before, kept = merge.state_dict(), StreamStore("run/stream").load()
    shutil.rmtree("run/stream/drafts", ignore_errors=True)
    Path("run/stream/drafts").write_text("in the way of every write")
    os.chmod("run/stream/drafts", 0o400)
    with (
        pytest.raises(OSError, match=r"could not be written to \S*run.stream.*What was saved there before is intact"),
        pytest.warns(UserWarning, match=r"fine-tuned weights are saved in \S*run.fine-tuned-02-task_2.ckpt"),
    ):
        fit(module, Task(1), merge)
    assert merge.report.tasks == ["task_1"]
    assert same(merge.state_dict()["merged"], before["merged"])
    assert same(torch.load("run/fine-tuned-02-task_2.ckpt")["state_dict"], everything(module))
    Path("run/stream/drafts").unlink()
    assert same(StreamStore("run/stream").load()["merged"], kept["merged"])
    fit(module, Task(1), merge)
    assert merge.report.tasks == ["task_1", "task_2"]


def test_another_size_of_the_calibration_buffer_is_told_and_not_used():
    process("run", stop_after=1)
    with pytest.warns(UserWarning, match="keeps 12 calibration samples.*calibration_size=64 is not used"):
        ContinualMergeCallback(dirpath="run", calibration_size=64)


def test_an_unknown_offload_is_refused():
    with pytest.raises(ValueError, match="offload is one of cpu, disk, got 'gpu'"):
        ContinualMergeCallback(offload="gpu")


def test_fast_dev_run_leaves_the_directory_alone():
    process("run", stop_after=1)
    files = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    merge = ContinualMergeCallback(dirpath="run", calibration_size=12)
    trainer = make_trainer(merge, fast_dev_run=True)
    trainer.fit(Classifier(dropout=0.2, batch_norm=True), datamodule=Task(1))
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == files


def test_micro_batches_keep_the_size_that_was_found_in_another_process(tmp_path):
    options = CalibrationOptions(batch_size="auto")
    _, merge = process(tmp_path, stop_after=2, calibration=options)
    found = merge._state.measured
    assert found["batch_size"] <= 12  # samples of both tasks, which may share a micro-batch
    _, again = process(tmp_path, calibration=options)
    assert len(again.report.tasks) == 3
    assert again._state.measured == found
    _, fixed = process(tmp_path / "fixed", calibration=CalibrationOptions(batch_size=found["batch_size"]))
    assert same(fixed._state.merged, again._state.merged)

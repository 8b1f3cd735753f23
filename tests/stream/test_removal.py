"""Tasks taken out of a stream again."""

import json
import logging
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from job import run_job
from safetensors.torch import save_file
from torch import nn
from toy import Classifier, Failing, Incoming, Task, accuracy, close, everything, fit, make_trainer, same

from lightning_odem import AverageMerge, ContinualMergeCallback
from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.methods import ClosedFormMerge, IsotropicMerge, TaskArithmeticMerge
from lightning_odem.report import StreamReport
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.identity import read_model, recorded_names
from lightning_odem.stream.removal import remove_task, take_out
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store import StreamInUseError, StreamLock

pytestmark = pytest.mark.usefixtures("small_stream")

WEIGHTS = {"shoes": 2.0, "hats": 1.0, "coats": 3.0, "socks": 0.5}
NAMES = list(WEIGHTS)


class Stream:
    """Tasks fitted one after the other, and the fine-tuned models that were merged."""

    def __init__(self, *names, dirpath="streams/shop", make=None, **options):
        torch.manual_seed(0)
        self.module, self.incoming = make() if make else Classifier(batch_norm=True), Incoming()
        options = {"method": "average", "weights": WEIGHTS, "calibration_size": 12, **options}
        self.merge = ContinualMergeCallback(dirpath=dirpath, **options)
        self.fit(*names)

    def fit(self, *names):
        for name in names:
            fit(self.module, Task(NAMES.index(name), name), self.incoming, self.merge)

    def model(self, name):
        return self.incoming.models[self.merge.report.tasks.index(name)]


def floats(snapshot):
    return {name: tensor for name, tensor in snapshot.items() if tensor.is_floating_point()}


METHODS = {
    "average": "average",
    "closed_form": ClosedFormMerge,
    "isotropic": IsotropicMerge,
    "task_arithmetic": TaskArithmeticMerge,
    "summed": partial(TaskArithmeticMerge, recursion="sum"),
}


@pytest.mark.parametrize("gone", ["shoes", "hats", "coats"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_left_is_the_stream_that_never_saw_the_task(method, gone):
    def make():
        return method if isinstance(method, str) else method()

    stream = Stream(*NAMES[:3], method=make(), dirpath="with")
    stream.merge.remove(gone, stream.model(gone))
    without = Stream(*(name for name in NAMES[:3] if name != gone), method=make(), dirpath="without")
    for further in ((), ("socks",)):
        stream.fit(*further)
        without.fit(*further)
        state, expected = stream.merge.state_dict(), without.merge.state_dict()
        assert close(floats(state["merged"]), floats(expected["merged"]), atol=1e-5)
        assert state["merged"]["body.1.running_var"].min() > 0.0
        assert stream.merge.report.tasks == without.merge.report.tasks
        assert state["fingerprints"] == expected["fingerprints"]
    assert stream.merge.report.merges[-1].t == without.merge.report.merges[-1].t == 0.5 / (6.5 - WEIGHTS[gone])


def test_the_sums_of_the_default_are_those_of_the_others_and_the_next_merge_searches_again():
    stream = Stream(*NAMES[:3], method="ode", dirpath="with")
    scale = stream.merge.state_dict()["method"]["scale"]
    stream.merge.remove("hats", stream.model("hats"))
    without = Stream("shoes", "coats", method="ode", dirpath="without")
    kept, expected = (found.merge.state_dict()["method"] for found in (stream, without))
    assert close(kept["mean"], expected["mean"], atol=1e-5)
    assert close(kept["sums"], expected["sums"], rtol=1e-4)
    assert kept["concentration"] == pytest.approx(expected["concentration"])
    assert kept["scale"] == scale
    stream.fit("socks")
    assert stream.merge.report.merges[-1].path["scale"][0] == (scale or 1.0)


def test_batch_norm_statistics_that_are_not_averaged_stay():
    stream = Stream("shoes", "hats", "coats", batch_norm="keep")
    before = stream.merge.state_dict()["merged"]
    stream.merge.remove("hats", stream.model("hats"))
    after = stream.merge.state_dict()["merged"]
    for name in ("body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["body.1.weight"], before["body.1.weight"])


class Counting(Classifier):
    """A module with a floating-point buffer of its own, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))
        self.body[0].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.largest = torch.maximum(self.largest, batch[0].max())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("method", ["average", "isotropic"])
def test_other_buffers_and_frozen_weights_stay(method):
    stream = Stream("shoes", "hats", "coats", make=Counting, method=method)
    before = stream.merge.state_dict()
    stream.merge.remove("shoes", stream.model("shoes"))
    after = stream.merge.state_dict()
    for name in ("largest", "body.0.weight"):
        assert torch.equal(after["merged"][name], before["merged"][name])
    assert after["method"].get("mean", {}).keys() == before["method"].get("mean", {}).keys()


class Grouped(Classifier):
    """A module with a grouped convolution, whose groups the names and shapes of tensors do not tell."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)

    def forward(self, inputs):
        return super().forward(self.conv(inputs[..., None].expand(-1, -1, 3)).mean(-1))


def test_each_group_of_a_convolution_stays_a_matrix_of_its_own():
    stream = Stream("shoes", "hats", "coats", make=Grouped, method="isotropic", dirpath="with")
    stream.merge.remove("hats", stream.model("hats"))
    without = Stream("shoes", "coats", make=Grouped, method="isotropic", dirpath="without")
    found, expected = (one.merge.state_dict()["merged"] for one in (stream, without))
    assert close(floats(found), floats(expected), atol=1e-5)


def test_nothing_of_the_task_is_left_but_a_note():
    stream = Stream("shoes", "hats", "coats", exclude=["head"], method="ode")
    report = stream.merge.report
    before = stream.merge.state_dict()
    stream.merge.remove("hats", stream.model("hats"))
    state, left = stream.merge.state_dict(), stream.merge.report
    assert list(state["buffer"]["tasks"]) == list(state["task_parameters"]) == list(state["fingerprints"]) == left.tasks
    assert left.tasks == ["shoes", "coats"]
    assert left.weights == [2.0, 3.0]
    assert left.accuracy == [report.accuracy[0], [report.accuracy[2][0], report.accuracy[2][2]]]
    assert left.fine_tuned == [report.fine_tuned[0], report.fine_tuned[2]]
    assert [record.task for record in left.merges] == ["shoes", "coats"]
    (note,) = left.removed
    assert (note.task, note.weight, note.measured_with) == ("hats", 1.0, ["coats"])
    assert "Taken out: hats. It was in what was measured after coats." in stream.merge.table(width=100)
    assert report.tasks == ["shoes", "hats", "coats"]
    assert before["report"]["tasks"] == ["shoes", "hats", "coats"]


def test_a_new_process_takes_a_task_out_and_the_stream_goes_on():
    first = Stream("shoes", "hats", "coats")
    torch.save({"state_dict": first.model("shoes")}, "shoes.ckpt")
    second = Stream()
    second.merge.remove("shoes", "shoes.ckpt")
    third = Stream()
    assert third.merge.report.tasks == ["hats", "coats"]
    assert third.merge.last_merged_path == second.merge.last_merged_path
    assert third.merge.table(100) == second.merge.table(100)
    third.fit("socks")
    without = Stream("hats", "coats", "socks", dirpath="without")
    assert close(floats(everything(third.module)), floats(everything(without.module)), atol=1e-5)
    assert StreamReport.load("streams/shop/report.json").removed == third.merge.report.removed


def test_the_checkpoint_of_the_merged_weights_is_written_anew(caplog):
    stream = Stream("shoes", "hats", "coats", exclude=["head"])
    heads = [stream.model(name)["head.weight"] for name in ("hats", "coats")]
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        stream.merge.remove("coats", stream.model("coats"))
    assert stream.merge.last_merged_path == str(Path("streams/shop/merged-02-without-coats.ckpt").absolute())
    assert "Took task 'coats' out: the stream holds shoes, hats." in caplog.text
    assert stream.merge.last_merged_path in caplog.text
    module = Classifier.load_from_checkpoint(stream.merge.last_merged_path, batch_norm=True)
    other = Classifier(batch_norm=True)
    stream.merge.load_task(other, "hats")
    assert close(floats(everything(module)), floats(everything(other)), atol=0)
    assert torch.equal(module.head.weight, heads[0])
    trainer = make_trainer()
    (metrics,) = trainer.test(other, datamodule=Task(1), ckpt_path=stream.merge.last_merged_path, verbose=False)
    assert metrics["test_accuracy"] == pytest.approx(accuracy(other, Task(1).test_set))


class Tied(Classifier):
    """Input and output share their weights."""

    def __init__(self):
        super().__init__()
        self.body[0] = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.body[0].weight


def test_tied_weights_stay_tied_in_the_checkpoint():
    stream = Stream("shoes", "hats", make=Tied)
    stream.merge.remove("shoes", stream.model("shoes"))
    module = Tied.load_from_checkpoint(stream.merge.last_merged_path)
    assert torch.allclose(module.head.weight, stream.incoming.models[1]["head.weight"], atol=1e-6)


def test_without_the_last_checkpoint_a_warning_says_how_to_get_the_weights():
    stream = Stream("shoes", "hats")
    Path(stream.merge.last_merged_path).unlink()
    with pytest.warns(UserWarning, match=r"No checkpoint .* without task 'shoes' was written: .*load_task"):
        stream.merge.remove("shoes", stream.model("shoes"))
    assert stream.merge.last_merged_path is None
    assert Stream().merge.last_merged_path is None


def test_in_a_stream_without_a_directory_it_happens_in_memory():
    module, incoming, merge = Classifier(), Incoming(), ContinualMergeCallback("average")
    for number in range(3):
        fit(module, Task(number), incoming, merge, fast_dev_run=True)
    assert merge.dirpath is None
    merge.remove("task_1", incoming.models[0])
    expected = {name: (incoming.models[1][name] + incoming.models[2][name]) / 2 for name in incoming.models[0]}
    merge.load_task(module, "task_3")
    assert close(everything(module), expected, atol=1e-6)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("by", ["module", "tensors", "ckpt", "safetensors", "folder"])
def test_the_model_may_be_given_in_any_form(by):
    stream = Stream("shoes", "hats")
    module = Classifier(batch_norm=True)
    module.load_state_dict(stream.model("shoes"))
    tensors = {f"model.{name}": tensor for name, tensor in stream.model("shoes").items()}
    Path("folder").mkdir()
    torch.save({"state_dict": tensors}, "shoes.ckpt")
    save_file(tensors, "shoes.safetensors")
    save_file(tensors, "folder/model.safetensors")
    model = {"module": module, "tensors": tensors, "ckpt": Path("shoes.ckpt"), "folder": "folder"}.get(
        by, f"shoes.{by}"
    )
    stream.merge.remove("shoes", model)
    assert close(floats(stream.merge.state_dict()["merged"]), floats(stream.incoming.models[1]), atol=1e-5)


def test_what_model_checkpoint_wrote_at_the_end_of_the_training_is_the_model():
    merge, module = ContinualMergeCallback("average", dirpath="run"), Classifier(batch_norm=True)
    for number in range(2):
        saving = L.pytorch.callbacks.ModelCheckpoint(f"task_{number + 1}", filename="last")
        fit(module, Task(number), merge, saving, enable_checkpointing=True)
    merge.remove("task_2", "task_2/last.ckpt")
    assert merge.report.tasks == ["task_1"]


def test_a_task_may_come_again_under_its_name():
    stream = Stream("shoes", "hats", "coats")
    stream.merge.remove("shoes", stream.model("shoes"))
    tasks = [Task(number, name) for number, name in enumerate(NAMES[:3])]
    assert [task.task_name for task in stream.merge.remaining(tasks)] == ["shoes"]
    stream.fit("shoes")
    report = stream.merge.report
    assert report.tasks == ["hats", "coats", "shoes"]
    expected = Stream("hats", "coats", "shoes", dirpath="other").merge
    assert close(floats(stream.merge.state_dict()["merged"]), floats(expected.state_dict()["merged"]), atol=1e-5)
    stream.merge.remove("hats", stream.incoming.models[1])
    assert [(note.task, note.measured_with) for note in stream.merge.report.removed] == [
        ("shoes", ["coats"]),
        ("hats", ["coats", "shoes"]),
    ]


def test_tasks_without_names_come_again_in_their_places():
    merge, module, incoming = ContinualMergeCallback("average", dirpath="run"), Classifier(), Incoming()
    tasks = [Task(number) for number in range(4)]
    for task in tasks[:3]:
        fit(module, task, incoming, merge)
    merge.remove("task_1", incoming.models[0])
    for task in merge.remaining(tasks):
        fit(module, task, merge)
    assert merge.report.tasks == ["task_2", "task_3", "task_1", "task_4"]


def test_a_task_that_comes_again_is_measured_on_its_new_data():
    first = Stream("shoes", "hats")
    second = Stream()
    assert list(second.merge.remaining([Task(0, "shoes"), Task(1, "hats")])) == []
    second.merge.remove("shoes", first.model("shoes"))
    other = Task(7, "shoes")
    fit(second.module, other, second.merge)
    row = second.merge.report.accuracy[-1]
    assert row == [accuracy(second.module, task.test_set) for task in (Task(1), other)]


def test_weights_by_position_are_refused_once_a_task_is_gone():
    stream = Stream("shoes", "hats", weights=[1.0, 2.0, 3.0])
    stream.merge.remove("hats", stream.model("hats"))
    with pytest.raises(ValueError, match=r"were taken out of the stream \(hats\).*Give weights by name"):
        stream.fit("coats")


def test_a_callback_in_memory_goes_on_with_what_another_one_has_left():
    first = Stream("shoes", "hats", "coats")
    second = Stream()
    second.merge.remove("shoes", first.model("shoes"))
    first.merge.load_base(first.module)
    first.fit("socks")
    assert first.merge.report.tasks == ["hats", "coats", "socks"]
    second.merge.remove("coats", first.incoming.models[2])
    assert second.merge.report.tasks == ["hats", "socks"]


def test_a_task_replaced_by_another_process_is_not_taken_for_the_old_one():
    first = Stream("shoes", "hats")
    second = Stream()
    second.merge.remove("hats", first.model("hats"))
    second.merge.load_base(second.module)
    fit(second.module, Task(9, "hats"), second.merge)
    first.merge.load_base(first.module)
    first.fit("coats")
    assert first.merge.report.tasks == ["shoes", "hats", "coats"]
    assert [note.task for note in first.merge.report.removed] == ["hats"]


def test_a_task_of_weight_0_changes_no_weights():
    stream = Stream("shoes", "hats", "coats", weights={**WEIGHTS, "hats": 0.0}, method="opcm")
    before = stream.merge.state_dict()
    stream.merge.remove("hats", stream.model("hats"))
    after = stream.merge.state_dict()
    assert same(after["merged"], before["merged"])
    assert after["report"]["tasks"] == ["shoes", "coats"]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [0.0, 0.0, 1.0]])
def test_the_only_task_that_counts_is_not_taken_out(weights):
    names = NAMES[: min(len(weights), 2)]
    stream = Stream(*names, weights=weights)
    with pytest.raises(ValueError, match="'shoes' is all that the merged model consists of.*Begin a new stream"):
        stream.merge.remove("shoes", stream.model("shoes"))
    assert stream.merge.report.tasks == Stream().merge.report.tasks == names


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="'boots' is not in the stream, which holds: shoes, hats"):
        Stream("shoes", "hats").merge.remove("boots", {})
    with pytest.raises(ValueError, match="which holds: no task"):
        ContinualMergeCallback().remove("boots", {})


def test_another_model_is_noticed_and_changes_nothing():
    stream = Stream("shoes", "hats", method="ode")
    before = stream.merge.state_dict()
    files = sorted(Path("streams/shop").rglob("*"))
    near = {name: tensor + 1e-4 for name, tensor in stream.model("shoes").items()}
    broken = {**stream.model("shoes"), "head.bias": torch.full((3,), torch.nan)}
    for model, message in [
        (stream.model("hats"), "'shoes' was merged with another model than the one given"),
        (near, "was merged with another model"),
        (broken, "infinite or NaN values in head.bias"),
        (Classifier(batch_norm=True, classes=4), r"head.weight: \(3, 8\) in the merged model, \(4, 8\)"),
        (Classifier(), "body.1.running_mean: in the merged model only"),
        ({"epoch": 3}, "these are none: epoch"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.merge.remove("shoes", model)
    with pytest.raises(FileNotFoundError):
        stream.merge.remove("shoes", "nowhere.ckpt")
    assert same(stream.merge.state_dict()["merged"], before["merged"])
    assert sorted(Path("streams/shop").rglob("*")) == files
    stream.fit("coats")


def test_a_method_that_cannot_says_which_can():
    stream = Stream("shoes", "hats", method="opcm")
    able = "average, closed_form, isotropic, ode, task_arithmetic"
    with pytest.raises(ValueError, match=f"'opcm' cannot take a task out again.*Methods that can are {able}\\."):
        stream.merge.remove("hats", stream.model("hats"))
    stream.fit("coats")


@pytest.mark.parametrize(("began", "method"), [("average", "ode"), ("average", "isotropic"), ("ode_paper", "average")])
def test_a_stream_that_another_method_has_merged_is_refused(began, method):
    stream = Stream("shoes", "hats", method=began)
    with pytest.raises(ValueError, match=f"{began} merged tasks of this stream, so '{method}' cannot take one out"):
        Stream(method=method).merge.remove("hats", stream.model("hats"))


@pytest.mark.parametrize(
    ("began", "method", "message"),
    [
        (IsotropicMerge(recursion=True), IsotropicMerge(), "do not hold the tasks of the stream one by one"),
        (IsotropicMerge(recursion=True), IsotropicMerge(recursion=True), "do not hold the tasks of the stream"),
        (IsotropicMerge(2.0), IsotropicMerge(), "was merged with other settings"),
    ],
)
def test_other_settings_than_those_of_the_stream_are_refused(began, method, message):
    stream = Stream("shoes", "hats", "coats", method=began)
    with pytest.raises(ValueError, match=message):
        Stream(method=method).merge.remove("hats", stream.model("hats"))


def test_no_task_is_taken_out_in_the_middle_of_a_fit():
    stream = Stream("shoes", "hats")

    class Removing(L.Callback):
        def on_train_batch_end(self, *arguments):
            stream.merge.remove("shoes", stream.model("shoes"))

    with pytest.raises(RuntimeError, match="'shoes' cannot be taken out of the stream while a task is fitted"):
        fit(stream.module, Task(2, "coats"), stream.merge, Removing())
    stream.merge.remove("shoes", stream.model("shoes"))
    with pytest.raises(OSError, match="cut"):
        fit(stream.module, Task(2, "coats"), Failing("on_train_end", OSError("power cut")), stream.merge)
    stream.merge.load_base(stream.module)
    stream.fit("shoes")
    stream.merge.remove("hats", stream.incoming.models[1])
    stream.fit("coats")


def test_a_stream_in_use_is_left_alone():
    stream = Stream("shoes", "hats")
    lock = StreamLock("streams/shop/stream/lock")
    lock.acquire()
    with pytest.raises(StreamInUseError):
        stream.merge.remove("shoes", stream.model("shoes"))
    lock.release()
    stream.merge.remove("shoes", stream.model("shoes"))


def test_with_the_state_on_disk_the_result_is_the_same():
    ends = []
    for offload in ("cpu", "disk"):
        stream = Stream("shoes", "hats", "coats", method="ode", offload=offload, dirpath=offload)
        stream.merge.remove("hats", stream.model("hats"))
        stream.fit("socks")
        ends.append(everything(stream.module))
    assert same(*ends)


def test_a_state_of_an_earlier_version_tells_its_tensors_by_their_names():
    stream = Stream("shoes", "hats", "coats")
    state = stream.merge._state
    names = recorded_names(state)
    for older in ("names", "fingerprints", "settings"):
        setattr(state, older, {})
    assert {key: sorted(found) for key, found in names.items()} == recorded_names(state)
    assert read_model(stream.model("hats"), state, "shoes").keys() == set(names["parameters"] + names["statistics"])
    left = take_out(state, AverageMerge(), "hats", stream.model("hats"))
    assert close(floats(left.merged), floats(Stream("shoes", "coats", dirpath="b").merge._state.merged), atol=1e-5)


class Clumsy(AverageMerge):
    """Fails when it has begun."""

    def remove(self, merged, withdrawn, share, context):
        merged.zero_()
        raise ValueError("it slipped")


def test_a_removal_that_fails_leaves_the_stream_as_it_was():
    stream = Stream("shoes", "hats", method=Clumsy())
    before = json.dumps(stream.merge.report.as_dict())
    merged = {name: tensor.clone() for name, tensor in stream.merge._state.merged.items()}
    with pytest.raises(ValueError, match="it slipped"):
        stream.merge.remove("shoes", stream.model("shoes"))
    assert json.dumps(stream.merge.report.as_dict()) == before
    assert same(stream.merge._state.merged, merged)
    assert same(Stream(method=Clumsy()).merge._state.merged, merged)


@pytest.mark.slow
def test_in_a_job_of_several_processes_it_is_refused_in_all():
    for raised in run_job(
        remove_task, 2, RunDirectory(None), StreamState(CalibrationBuffer()), AverageMerge(), "a", {}
    ):
        assert raised.kind == "RuntimeError"
        assert "A task is taken out by one process" in raised.message

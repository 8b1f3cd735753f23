"""Checkpoints: what they hold, and streams that go on in another process."""

import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils._pytree import tree_leaves
from toy import FEATURES, Classifier, Failing, Incoming, Streamed, Task, accuracy, everything, fit, make_trainer, same

from lightning_odem import CalibrationOptions, ContinualMergeCallback
from lightning_odem.methods import OPCMMerge
from lightning_odem.report import StreamReport
from lightning_odem.stream.store import StreamStateError

pytestmark = pytest.mark.usefixtures("small_stream")

KEY = "ContinualMergeCallback"


class Hyper(Classifier):
    def __init__(self, width=8, classes=3):
        super().__init__(batch_norm=True, classes=classes)
        self.save_hyperparameters()


def merged_stream(tasks, directory=None, module=None, **options):
    module = module or Classifier(batch_norm=True)
    merge = ContinualMergeCallback(dirpath=directory, **options)
    for number in range(tasks):
        trainer = fit(module, Task(number), merge)
    return module, merge, trainer


def test_a_checkpoint_of_the_merged_model_is_written_after_every_merge_and_loads_safely():
    module, merge, _ = merged_stream(2, module=Hyper())
    assert merge.last_merged_path == str(merge.dirpath / "merged-02-task_2.ckpt")
    assert [record.checkpoint for record in merge.report.merges] == [
        str(merge.dirpath / name) for name in ("merged-01-task_1.ckpt", "merged-02-task_2.ckpt")
    ]
    content = torch.load(merge.last_merged_path, weights_only=True)
    assert same(content["state_dict"], everything(module))
    assert "optimizer_states" not in content
    for options in ({}, {"weights_only": True}):
        loaded = Hyper.load_from_checkpoint(merge.last_merged_path, **options)
        assert same(everything(loaded), everything(module))


def test_the_trainer_tests_the_merged_model_given_its_checkpoint():
    module, merge, trainer = merged_stream(2)
    expected = accuracy(module, Task(1).test_set)
    module.load_state_dict(everything(Classifier(batch_norm=True)))
    (measured,) = trainer.test(module, datamodule=Task(1), ckpt_path=merge.last_merged_path, verbose=False)
    assert measured["test_accuracy"] == pytest.approx(expected)


def test_the_streams_state_in_a_full_checkpoint_loads_with_weights_only(tmp_path):
    module, merge, trainer = merged_stream(2, exclude=["head"])
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    state = torch.load(tmp_path / "full.ckpt", weights_only=True)["callbacks"][KEY]
    assert state["report"]["tasks"] == ["task_1", "task_2"]
    assert state["started"] == {}
    merged = {name: value for name, value in everything(module).items() if not name.startswith("head")}
    assert same(state["merged"], merged)
    assert state["task_parameters"].keys() == {"task_1", "task_2"}


def test_the_state_does_not_keep_more_memory_alive_than_it_shows(tmp_path):
    _, merge, trainer = merged_stream(2, calibration_size=4)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    state = torch.load(tmp_path / "full.ckpt", weights_only=True)["callbacks"][KEY]

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from tensors(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from tensors(item)

    found = list(tensors(state))
    assert len(found) > 10
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found)


def continued(tmp_path, **options):
    """Two tasks in one process, the third in another; returns module and callback of both ways."""
    module, merge, _ = merged_stream(3, "whole", **options)
    _, first, trainer = merged_stream(2, "parts", **options)
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    other, second = Classifier(batch_norm=True), ContinualMergeCallback(**options)
    torch.nn.init.zeros_(other.body[0].weight)  # the base comes with the state, not with the module
    second.load_state_dict(torch.load(tmp_path / "full.ckpt", weights_only=True)["callbacks"][KEY])
    fit(other, Task(2), second)
    return (module, merge), (other, second)


@pytest.mark.parametrize(
    "options",
    [{}, {"finetune_from": "merged"}, {"method": "average", "weights": [1.0, 3.0, 2.0]}, {"method": "opcm"}],
    ids=["default", "from_merged", "weights", "method_with_state"],
)
def test_a_stream_goes_on_in_another_process_from_its_state(tmp_path, options):
    (module, merge), (other, second) = continued(tmp_path, **options)
    assert same(everything(module), everything(other))
    assert second.report.tasks == merge.report.tasks
    assert [record.loss_after for record in second.report.merges][1:] == pytest.approx(
        [record.loss_after for record in merge.report.merges][1:], nan_ok=True
    )
    assert second.dirpath.name == "parts"
    assert second.report.accuracy[2][2] == merge.report.accuracy[2][2]


def test_a_merge_method_that_served_another_stream_starts_anew():
    method = OPCMMerge()
    modules = [merged_stream(2, f"run{number}", method=method)[0] for number in range(2)]
    assert same(*map(everything, modules))


def test_one_state_can_be_loaded_into_several_callbacks_that_go_their_own_ways():
    _, merge, _ = merged_stream(1)
    state = merge.state_dict()
    branches = [ContinualMergeCallback(dirpath=name) for name in ("a", "b")]
    for branch, name in zip(branches, ("a", "b"), strict=True):
        branch.load_state_dict(state)
        fit(Classifier(batch_norm=True), Task(1, name=name), branch)
    assert merge.report.tasks == ["task_1"]
    assert [branch.report.tasks for branch in branches] == [["task_1", "a"], ["task_1", "b"]]


# ---------------------------------------------------------------------------------------------------- resuming a task


def trained_but_not_merged(tmp_path, **options):
    """Task 1 merged, the process dead between training and merge of task 2, whose checkpoints are kept."""
    module, merge = Classifier(batch_norm=True), ContinualMergeCallback(dirpath="cut")
    fit(module, Task(0), merge, **options)
    saved = ModelCheckpoint(tmp_path / "task", "{step}", save_top_k=-1, save_last=True, every_n_train_steps=1)
    ends = ModelCheckpoint(tmp_path / "epochs", save_last=True)
    failing = Failing("on_train_end", RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, Task(1), failing, merge, saved, ends, enable_checkpointing=True, **options)


def resume(path, **options):
    """The same task in a new process: new module, new callback, new Trainer."""
    module, merge, incoming = Classifier(batch_norm=True), ContinualMergeCallback(dirpath="cut"), Incoming()
    torch.nn.init.zeros_(module.body[0].weight)
    # By its name, since the process before may have merged it.
    fit(module, Task(1, "task_2"), incoming, merge, ckpt_path=path, **options)
    return module, merge, incoming


EPOCHS = {}
STEPS = {"max_steps": 6}
NO_VALIDATION = {"limit_val_batches": 0}


@pytest.mark.parametrize(
    ("step", "options"), [(1, EPOCHS), (3, EPOCHS), (4, EPOCHS), (3, STEPS), (5, STEPS), (3, NO_VALIDATION)]
)
def test_a_task_resumed_in_its_middle_ends_as_if_it_had_not_been_interrupted(tmp_path, step, options):
    class OneBatch(Task):
        """All batches are equal, since a plain DataLoader starts anew in the middle of an epoch."""

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.ConcatDataset([self.train_set] * 3), batch_size=24)

    def stream(number, *callbacks, ckpt_path=None):
        fit(module, OneBatch(number, f"task_{number + 1}"), *callbacks, ckpt_path=ckpt_path, **options)

    module, reference, whole = Classifier(batch_norm=True), ContinualMergeCallback(dirpath="whole"), Incoming()
    for number in range(2):
        stream(number, whole, reference)
    expected = everything(module)

    module, merge = Classifier(batch_norm=True), ContinualMergeCallback(dirpath="cut")
    stream(0, merge)
    saved = ModelCheckpoint(tmp_path / "task", "{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(
            module, OneBatch(1, "task_2"), merge, saved, Failing("on_train_end", RuntimeError("power cut")),
            enable_checkpointing=True, **options,
        )  # fmt: skip
    module, merge, incoming = Classifier(batch_norm=True), ContinualMergeCallback(dirpath="cut"), Incoming()
    torch.nn.init.zeros_(module.body[0].weight)
    stream(1, incoming, merge, ckpt_path=tmp_path / "task" / f"step={step}.ckpt")
    assert incoming.steps == [6 - step]
    assert same(incoming.models[0], whole.models[1])
    assert same(everything(module), expected)
    assert merge.report.tasks == ["task_1", "task_2"]
    for name in ("pretrained", "before_training", "fine_tuned"):
        assert getattr(merge.report, name) == pytest.approx(getattr(reference.report, name), nan_ok=True)


def large_stream(tmp_path, **options):
    """Two tasks with many samples; the second one's checkpoint."""
    settings = {"dirpath": str(tmp_path / "stream"), "calibration": CalibrationOptions(**options)}
    module, merge = Classifier(), ContinualMergeCallback(calibration_size=1000, **settings)
    fit(module, Task(0, "first", size=900), merge, max_epochs=1)
    kept = ModelCheckpoint(tmp_path / "kept")
    fit(module, Task(1, "second", size=900), merge, kept, max_epochs=1, enable_checkpointing=True)
    return kept.best_model_path, merge


def test_a_checkpoint_refers_to_the_calibration_samples_on_disk(tmp_path):
    path, merge = large_stream(tmp_path / "small")
    whole, _ = large_stream(tmp_path / "whole", in_checkpoints=True)
    assert Path(whole).stat().st_size - Path(path).stat().st_size > 0.9 * 900 * (FEATURES * 4 + 8)
    state = torch.load(path, weights_only=True)["callbacks"][merge.state_key]
    other = ContinualMergeCallback(calibration_size=1000)
    other.load_state_dict(state)
    assert other._state.buffer.counts == {"first": 900}
    carried = torch.load(whole, weights_only=True)["callbacks"][merge.state_key]["buffer"]["tasks"]["first"]
    found = other._state.buffer.state_dict()["tasks"]["first"]
    pairs = list(zip(tree_leaves(carried), tree_leaves(found), strict=True))
    tensors = [(one, two) for one, two in pairs if isinstance(one, torch.Tensor)]
    assert len(tensors) >= 2
    assert all(torch.equal(one, two) for one, two in tensors)


def test_calibration_samples_are_found_where_the_stream_was_moved_to(tmp_path):
    path, merge = large_stream(tmp_path)
    (tmp_path / "stream").rename(tmp_path / "elsewhere")
    state = torch.load(path, weights_only=True)["callbacks"][merge.state_key]
    with pytest.raises(StreamStateError, match=r"refers to calibration samples in buffer-.*in_checkpoints=True"):
        ContinualMergeCallback().load_state_dict(state)
    moved = ContinualMergeCallback(dirpath=str(tmp_path / "elsewhere"), calibration_size=1000)
    moved.load_state_dict(state)
    assert moved._state.buffer.counts == {"first": 900}


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("epochs/last.ckpt", EPOCHS),
        ("epochs/last.ckpt", STEPS),
        ("epochs/last.ckpt", NO_VALIDATION),
        ("task/last.ckpt", STEPS),
        ("task/step=6.ckpt", EPOCHS),
        ("task/step=6.ckpt", NO_VALIDATION),
    ],
)
def test_a_process_that_died_between_training_and_merge_merges_once_when_resumed(tmp_path, file, options):
    reference, _, _ = merged_stream(2, "whole")
    trained_but_not_merged(tmp_path, **options)
    module, merge, incoming = resume(tmp_path / file, **options)
    assert incoming.batches == 0
    assert merge.report.tasks == ["task_1", "task_2"]
    assert same(everything(module), everything(reference))
    # And the stream goes on from there.
    fit(module, Task(2), merge)
    assert merge.report.tasks == ["task_1", "task_2", "task_3"]


def test_one_trainer_goes_on_to_the_next_task_after_resuming_one(tmp_path):
    reference, _, _ = merged_stream(3, "whole")
    trained_but_not_merged(tmp_path)
    module, merge, incoming = Classifier(batch_norm=True), ContinualMergeCallback(dirpath="cut"), Incoming()
    trainer = make_trainer(incoming, merge)
    trainer.fit(module, datamodule=Task(1), ckpt_path=tmp_path / "epochs" / "last.ckpt")
    trainer.fit(module, datamodule=Task(2))
    assert incoming.steps == [6]
    assert merge.report.tasks == ["task_1", "task_2", "task_3"]
    assert same(everything(module), everything(reference))


def test_a_stream_of_batches_that_ended_before_the_merge_needs_samples_to_be_merged(tmp_path):
    last, failing = ModelCheckpoint(tmp_path, save_last=True), Failing("on_train_end", RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Classifier(), Streamed(0), failing, ContinualMergeCallback(), last, enable_checkpointing=True)
    merge = ContinualMergeCallback()
    with pytest.raises(ValueError, match=r"or the callback samples in calibration_data\['task_1'\]"):
        fit(Classifier(), Streamed(0), merge, ckpt_path=tmp_path / "last.ckpt")
    merge.calibration_data["task_1"] = Task(0).train_set
    fit(Classifier(), Streamed(0), merge, ckpt_path=tmp_path / "last.ckpt")
    assert merge.report.tasks == ["task_1"]


def test_resuming_after_the_merge_was_done_merges_again_to_the_same_result(tmp_path):
    module, merge = Classifier(batch_norm=True), ContinualMergeCallback(dirpath="cut")
    fit(module, Task(0), merge)
    fit(module, Task(1), merge, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    again, other, _ = resume(tmp_path / "last.ckpt")
    assert same(everything(again), everything(module))
    assert other.report.tasks == ["task_1", "task_2"]
    assert other.last_merged_path == merge.last_merged_path


@pytest.mark.parametrize("same_callback", [True, False])
def test_resuming_a_task_that_is_merged_is_refused_where_its_data_has_no_name(tmp_path, same_callback):
    module, merge = Classifier(), ContinualMergeCallback("average", dirpath="cut")
    fit(module, Task(0), merge, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    accuracies = merge.report.accuracy
    if not same_callback:
        merge = ContinualMergeCallback("average", dirpath="cut")
    incoming = Incoming()
    with pytest.raises(MisconfigurationException, match=r"has merged 'task_1' already. Fit the next task without"):
        fit(module, Task(1), incoming, merge, ckpt_path=tmp_path / "last.ckpt")
    assert incoming.batches == 0
    again = ContinualMergeCallback("average", dirpath="cut")
    assert again.report.accuracy == accuracies
    fit(module, Task(1), again)
    assert again.report.tasks == ["task_1", "task_2"]


def test_resuming_in_the_same_process_takes_the_stream_back_to_the_checkpoint(tmp_path):
    module, merge, incoming = Classifier(batch_norm=True), ContinualMergeCallback(), Incoming()
    fit(module, Task(0), incoming, merge)
    last = ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(module, Task(1), incoming, merge, last, enable_checkpointing=True)
    merged = everything(module)
    trainer.fit(module, datamodule=Task(1, "task_2"), ckpt_path=last.last_model_path)
    assert merge.report.tasks == ["task_1", "task_2"]
    assert same(everything(module), merged)
    assert incoming.steps == [6, 6]


def test_an_older_stream_may_not_overwrite_a_longer_one(tmp_path):
    module, merge = Classifier(batch_norm=True), ContinualMergeCallback(dirpath="cut")
    last = ModelCheckpoint(tmp_path, save_last=True)
    fit(module, Task(0), merge, last, enable_checkpointing=True)
    for number in range(1, 3):
        fit(module, Task(number), merge)
    with pytest.raises(MisconfigurationException, match="holds another stream already"):
        fit(module, Task(0), ContinualMergeCallback(dirpath="cut"), ckpt_path=last.last_model_path)


def test_resuming_with_the_data_of_another_task_is_refused(tmp_path):
    module, merge = Classifier(), ContinualMergeCallback()
    last = ModelCheckpoint(tmp_path, save_last=True)
    fit(module, Task(0, "digits"), merge, last, enable_checkpointing=True)
    with pytest.raises(ValueError, match="saved while task 'digits' was trained.*that of task 'letters'"):
        fit(module, Task(1, "letters"), ContinualMergeCallback(), max_epochs=3, ckpt_path=last.last_model_path)


def test_a_resumed_task_keeps_the_samples_and_the_weight_it_began_with(tmp_path):
    module, merge = Classifier(), ContinualMergeCallback(weights=[2.0, 6.0])
    fit(module, Task(0), merge)
    last = ModelCheckpoint(tmp_path, save_last=True)
    fit(module, Task(1), merge, last, enable_checkpointing=True)
    other = ContinualMergeCallback(dirpath="other")
    fit(Classifier(), Task(1), other, ckpt_path=last.last_model_path)
    assert other.report.weights == [2.0, 6.0]
    assert other.report.merges[1].t == 0.75
    assert other.report.merges[1].calibration == merge.report.merges[1].calibration


def test_accuracies_on_tasks_of_another_process_are_not_measured(tmp_path):
    (_, merge), (_, second) = continued(tmp_path)
    assert [math.isnan(value) for value in second.report.accuracy[2]] == [True, True, False]
    assert second.report.accuracy[:2] == merge.report.accuracy[:2]


@pytest.mark.parametrize(
    "averaging",
    [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)],
    ids=["ema", "swa"],
)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_averages_of_a_training_that_ended_before_the_merge_are_merged_when_resumed(tmp_path, averaging, batch_norm):
    incoming = Incoming()
    fit(Classifier(batch_norm=batch_norm), Task(0), averaging(), incoming, ContinualMergeCallback())
    last = ModelCheckpoint(tmp_path, save_last=True)
    failing = Failing("on_train_end", RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(
            Classifier(batch_norm=batch_norm), Task(0), averaging(), failing, ContinualMergeCallback(), last,
            enable_checkpointing=True,
        )  # fmt: skip
    module = Classifier(batch_norm=batch_norm)
    fit(module, Task(0), averaging(), ContinualMergeCallback(), ckpt_path=tmp_path / "last.ckpt")
    assert same(everything(module), incoming.models[0])


def checkpoints_of(merge):
    return sorted(path.name for path in merge.dirpath.glob("merged-*.ckpt"))


@pytest.mark.parametrize(("keep", "kept"), [({}, 3), ({"keep_checkpoints": 1}, 1), ({"keep_checkpoints": None}, 5)])
def test_the_last_checkpoints_stay_and_the_report_names_no_other(keep, kept):
    module, merge = Classifier(), ContinualMergeCallback(method="average", dirpath="run", calibration_size=12, **keep)
    for number in range(5):
        fit(module, Task(number), merge)
    assert checkpoints_of(merge) == [f"merged-0{number}-task_{number}.ckpt" for number in range(1, 6)][-kept:]
    named = [record.checkpoint for record in StreamReport.load("run/report.json").merges]
    assert named[:-kept] == [None] * (5 - kept)
    assert all(Path(path).exists() for path in named[-kept:])
    assert named == [record.checkpoint for record in ContinualMergeCallback(dirpath="run").report.merges]
    loaded = Classifier.load_from_checkpoint(merge.last_merged_path)
    assert same(everything(loaded), everything(module))


def test_files_of_others_and_of_a_stream_without_room_are_left_alone():
    module, merge = Classifier(), ContinualMergeCallback(method="average", dirpath="run", keep_checkpoints=1)
    fit(module, Task(0), merge)
    Path("run/merged-07-mine.ckpt").write_text("mine")
    fit(module, Task(1), merge)
    assert checkpoints_of(merge) == ["merged-02-task_2.ckpt", "merged-07-mine.ckpt"]


def test_a_merge_that_fails_removes_no_checkpoint():
    module, merge = Classifier(), ContinualMergeCallback(method="average", dirpath="run", keep_checkpoints=1)
    fit(module, Task(0), merge)
    shutil.rmtree("run/stream/drafts", ignore_errors=True)
    Path("run/stream/drafts").write_text("in the way")
    with pytest.raises(OSError, match="could not be written"):
        fit(module, Task(1), merge)
    assert Path(merge.last_merged_path).exists()


@pytest.mark.slow
def test_the_cost_of_a_task_hardly_grows_with_their_number():
    module = Classifier()
    merge = ContinualMergeCallback(method="average", dirpath="run", calibration_size=12, evaluate=False)
    seconds = []
    for number in range(90):
        started = time.process_time()
        fit(module, Task(number % 5, name=f"task_{number}"), merge, max_steps=1)
        seconds.append(time.process_time() - started)
    first, last = (sorted(part)[10] for part in (seconds[10:30], seconds[-20:]))
    assert last < 4 * first, (first, last)

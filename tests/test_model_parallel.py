"""Streams whose parameters two processes share (FSDP2 by ModelParallelStrategy), beside those that each holds whole."""

import shutil
from pathlib import Path

import pytest
import torch
from scripts import run_processes
from torch.utils._pytree import tree_flatten_with_path
from toy import Classifier, Task, close, everything, fit, same

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods import ODEMerge, resolve_method
from lightning_odem.stream.store import StreamStore

pytestmark = pytest.mark.slow


def run(script, *arguments):
    run_processes(Path(__file__).parent / "helpers" / script, *arguments)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model_parallel")
    run("model_parallel.py", directory, "ode")
    return directory


def test_shards_are_merged_like_whole_parameters(directory):
    whole, shards = (torch.load(directory / f"{kind}-0.pt") for kind in ("whole", "shards"))
    assert close(whole["merged"], shards["merged"], rtol=1e-6, atol=1e-7)
    for tasks in ("whole", "shards"):
        state = StreamStore(directory / tasks / "stream").load()
        assert {name: tuple(kept.shape) for name, kept in state["method"]["mean"].items()} == {
            name: tuple(kept.shape) for name, kept in state["merged"].items()
        }
        assert sum(len(task["samples"][0]) for task in state["buffer"]["tasks"].values()) == 12
    assert whole["path"]["loss"] == pytest.approx(shards["path"]["loss"], rel=1e-6)


def test_a_task_resumed_from_a_checkpoint_is_merged_onto_the_stream_of_the_directory(directory):
    whole, shards = (torch.load(directory / f"{kind}-0.pt") for kind in ("whole", "shards"))
    assert whole["tasks"] == shards["tasks"] == ["task_1", "task_2", "task_3"]
    assert close(whole["resumed"], shards["resumed"], rtol=1e-6, atol=1e-7)
    assert not close(shards["merged"], shards["resumed"], atol=1e-4)


def test_files_hold_whole_tensors(directory):
    for kind in ("whole", "shards"):
        content = torch.load(directory / kind / "merged-03-task_3.ckpt", weights_only=True)
        resumed = torch.load(directory / f"{kind}-0.pt")["resumed"]
        assert all(torch.equal(content["state_dict"][name], tensor) for name, tensor in resumed.items())


@pytest.mark.parametrize("name", ["closed_form", "task_singular_vectors"])
def test_whole_parameters_of_shards_are_merged_and_resumed_as_where_each_process_holds_all(
    tmp_path, name, without_figures
):
    run("model_parallel.py", tmp_path, name)
    whole, shards = (torch.load(tmp_path / f"{kind}-0.pt") for kind in ("whole", "shards"))
    assert whole["tasks"] == shards["tasks"] == ["task_1", "task_2", "task_3"]
    assert not close(shards["merged"], shards["resumed"], atol=1e-4)
    for when in ("merged", "resumed"):
        assert close(whole[when], shards[when], rtol=1e-5, atol=1e-6)
    states = [StreamStore(tmp_path / kind / "stream").load()["method"] for kind in ("whole", "shards")]
    tensors = [dict(tree_flatten_with_path(state)[0]) for state in states]
    assert tensors[0].keys() == tensors[1].keys()
    assert {path: getattr(found, "shape", found) for path, found in tensors[0].items()} == {
        path: getattr(found, "shape", found) for path, found in tensors[1].items()
    }
    merge = ContinualMergeCallback(resolve_method(name), dirpath=str(tmp_path / "shards"), calibration_size=12)
    fit(Classifier(batch_norm=False), Task(3), merge)
    assert len(merge.report.tasks) == 4


def test_a_single_process_takes_a_task_out_of_a_stream_of_shards(directory, tmp_path):
    for kind in ("whole", "shards"):
        shutil.copytree(directory / kind, tmp_path / kind)
        merge = ContinualMergeCallback(ODEMerge(descent=0.01), dirpath=str(tmp_path / kind), calibration_size=12)
        before = merge.state_dict()
        # Of shards no fingerprint is kept.
        assert list(before["fingerprints"]) == (merge.report.tasks if kind == "whole" else [])
        model = {name: tensor + 0.25 for name, tensor in before["base"].items()}
        if kind == "whole":
            with pytest.raises(ValueError, match="was merged with another model"):
                merge.remove("task_2", model)
            continue
        merge.remove("task_2", model)
        mean = merge.state_dict()["method"]["mean"]
        for name, kept in before["method"]["mean"].items():
            torch.testing.assert_close(mean[name], (3 * kept - 0.25) / 2)
        content = torch.load(merge.last_merged_path, weights_only=True)["state_dict"]
        assert same(content, merge.state_dict()["merged"])


def test_a_single_process_goes_on_with_a_stream_of_shards(directory, monkeypatch, without_figures):
    monkeypatch.chdir(directory)
    ends = []
    for kind in ("whole", "shards"):
        module = Classifier(batch_norm=False)
        merge = ContinualMergeCallback(ODEMerge(), calibration_size=12, dirpath=kind)
        fit(module, Task(3), merge)
        assert len(merge.report.tasks) == 4
        ends.append(everything(module))
    assert close(*ends, rtol=1e-5, atol=1e-6)


def test_a_stream_goes_on_with_a_module_that_lightning_gives_shards_and_memory_to(tmp_path):
    run("late_module.py", tmp_path)
    run("late_module.py", tmp_path)
    whole, parts = (torch.load(tmp_path / kind / "end.pt") for kind in ("whole", "parts"))
    assert "heads.task_1.weight" in whole["tensors"]
    assert same(parts["tensors"], whole["tensors"])
    assert parts["accuracy"] == whole["accuracy"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resumed_shards")
    run("resumed_shards.py", directory)
    run("resumed_shards.py", directory)
    return directory


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("exclusion", ["frozen", "trained"])
def test_a_stream_with_an_excluded_head_goes_on_as_if_it_had_never_stopped(resumed, exclusion, precision):
    case = f"{exclusion}-{precision}"
    whole, parts = (torch.load(resumed / kind / case / "end.pt") for kind in ("whole", "parts"))
    assert same(parts["tensors"], whole["tensors"])
    assert parts["accuracy"] == whole["accuracy"]
    state = StreamStore(resumed / "parts" / case / "stream").load()
    heads = [state["fixed"]] if exclusion == "frozen" else state["task_parameters"].values()
    assert all(head["head.weight"].shape == (3, 8) for head in heads)


def test_snapshots_of_a_training_run_are_whole_in_a_checkpoint_in_mid_task(resumed):
    whole, parts = (torch.load(resumed / kind / "mid-task" / "end.pt") for kind in ("whole", "parts"))
    assert same(parts["tensors"], whole["tensors"])
    content = torch.load(resumed / "parts" / "saved" / "last.ckpt", weights_only=True)
    trail = content["callbacks"]["ContinualMergeCallback"]["started"]["collected"]["Snapshots"]
    assert {snapshot["body.0.weight"].shape for snapshot in trail["snapshots"].values()} == {(8, 4)}

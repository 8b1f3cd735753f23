"""Streams whose directory is damaged: what they go on from, and what they say."""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from streams import process
from toy import Classifier, Task, everything, fit, same

from lightning_odem import ContinualMergeCallback
from lightning_odem.report import StreamReport
from lightning_odem.stream.store import StreamStateError, StreamStore

pytestmark = pytest.mark.usefixtures("small_stream")


def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so():
    module, whole = process("run")
    newest = max(Path("run/stream").glob("*.json"))
    newest.write_text(newest.read_text().replace("task_3", "task_4"))
    with pytest.warns(UserWarning, match=rf"damaged: .*{newest.name}.*goes on from generation 2"):
        other, merge = process("run")
    assert merge.report.tasks == ["task_1", "task_2", "task_3"]
    assert same(everything(other), everything(module))


def test_a_state_without_any_whole_generation_is_refused():
    process("run", stop_after=1)
    for path in Path("run/stream").glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(StreamStateError, match=r"No state of the stream in \S*run.stream is whole: .*safetensors"):
        ContinualMergeCallback(dirpath="run")


@pytest.fixture
def damaged_base():
    """A stream of one task in which one bit of the only copy of the base model is wrong."""
    process("run", stop_after=1)
    (path,) = Path("run/stream").glob("base-*")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    yield path
    assert path.read_bytes() == content


def test_a_damaged_base_model_is_mended_from_a_module_that_holds_it(damaged_base):
    whole, _ = process("whole")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        process("run")
    told = [str(warning.message) for warning in caught if "damaged" in str(warning.message)]
    whole_tensors, tensors = re.search(r"(\d+) of its (\d+) tensors verify; damaged are \S+\. ", told[0]).groups()
    assert int(whole_tensors) == int(tensors) - 1
    assert told[1].endswith("was damaged and is written again from the module.")
    assert StreamReport.load("run/report.json").tasks == ["task_1", "task_2", "task_3"]
    module = Classifier(dropout=0.2, batch_norm=True)
    ContinualMergeCallback(dirpath="run").load_task(module, "task_3")
    assert same(everything(module), everything(whole))


def test_a_damaged_base_model_is_not_taken_from_another_module(damaged_base):
    with pytest.warns(UserWarning, match="damaged"):
        merge = ContinualMergeCallback(dirpath="run", calibration_size=12)
    other = Classifier(dropout=0.2, batch_norm=True)
    torch.nn.init.zeros_(other.head.bias)
    damaged = damaged_base.read_bytes()
    for _ in range(2):
        with pytest.raises(StreamStateError, match=r"base model in \S*stream is damaged, and Classifier does not hold"):
            fit(other, Task(1), merge)
    with pytest.raises(ValueError, match="file of the base model is damaged"):
        merge.load_base(other)
    assert damaged_base.read_bytes() == damaged
    fit(Classifier(dropout=0.2, batch_norm=True), Task(1), merge)
    assert merge.report.tasks == ["task_1", "task_2"]


def test_a_newer_format_is_refused():
    process("run", stop_after=1)
    store = StreamStore("run/stream")
    state = store.load()
    store.save({**state, "version": 3})
    with pytest.raises(ValueError, match="has version 3; this package reads 1 and 2"):
        ContinualMergeCallback(dirpath="run")


def test_pipes_in_the_directory_are_replaced_or_named():
    process("run", stop_after=1)
    for path in (Path("run/report.json"), Path(f"run/.report.json.{os.getpid()}")):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    os.mkfifo("run/stream/000007.json")
    with pytest.warns(UserWarning, match="000007.json is no regular file"):
        process("run", stop_after=1)
    assert StreamReport.load("run/report.json").tasks == ["task_1", "task_2"]

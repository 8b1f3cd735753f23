import io
import math

import pytest
import torch

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.stream.state import StreamState


def full_state():
    """A state in which no entry is at its default."""
    buffer = CalibrationBuffer(4, "utility", seed=7)
    buffer.add("a", (torch.arange(6, dtype=torch.uint8).view(6, 1), torch.arange(6) % 2), weight=2.0)
    record = MergeRecord("a", t=1.0, method="ode", path={"t": [0.0, 1.0]}, calibration={"a": 4}, checkpoint="a.ckpt")
    report = StreamReport(["a"], [2.0], [[0.5]], [0.25], [0.75], [math.nan], [record])
    return StreamState(
        buffer,
        base={"weight": torch.ones(2)},
        merged={"weight": torch.zeros(2, dtype=torch.bfloat16), "count": torch.tensor(3)},
        task_parameters={"a": {"head": torch.rand(3)}},
        report=report,
        method={"norms": [1.0, 2.0], "fisher": torch.rand(2)},
        dirpath="runs/version_0",
        started={"task": "b", "weight": 1.0, "pretrained": 0.1, "before_training": 0.2},
    )


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second or first != first


@pytest.mark.parametrize("make", [full_state, lambda: StreamState(CalibrationBuffer(4))], ids=["full", "new"])
def test_every_entry_survives_a_file_read_with_weights_only(make):
    state, other = make(), StreamState(CalibrationBuffer(99))
    other.load_state_dict(through_a_file(state.state_dict()))
    assert_same(other.state_dict(), state.state_dict())


def test_loading_replaces_everything_there_was():
    state = full_state()
    state.load_state_dict(StreamState(CalibrationBuffer(4)).state_dict())
    assert_same(state.state_dict(), StreamState(CalibrationBuffer(4)).state_dict())


def test_the_state_of_a_newer_version_is_refused_and_changes_nothing():
    state = full_state()
    before = state.state_dict()
    with pytest.raises(ValueError, match="has version 3; this package reads 1 and 2"):
        state.load_state_dict({**StreamState(CalibrationBuffer(4)).state_dict(), "version": 3})
    assert_same(state.state_dict(), before)


def test_states_loaded_from_one_dictionary_do_not_share_what_changes():
    shared = full_state().state_dict()
    first, second = (StreamState(CalibrationBuffer(1)) for _ in range(2))
    first.load_state_dict(shared)
    second.load_state_dict(shared)
    first.report.tasks.append("b")
    first.report.accuracy[0].append(0.1)
    first.report.merges[0].path["t"].append(2.0)
    first.started["pretrained"] = 0.9
    first.buffer.add("b", (torch.zeros(6, 1, dtype=torch.uint8), torch.zeros(6, dtype=torch.long)))
    for state in (second.state_dict(), shared):
        assert_same(state, full_state_but_random(state))


def full_state_but_random(state):
    expected = full_state().state_dict()
    expected["task_parameters"], expected["method"] = state["task_parameters"], state["method"]
    return expected


def test_a_state_saved_earlier_does_not_change_with_the_stream():
    state = full_state()
    saved = state.state_dict()
    state.started["pretrained"] = 0.9
    state.report.tasks.append("b")
    assert saved["started"]["pretrained"] == 0.1
    assert saved["report"]["tasks"] == ["a"]

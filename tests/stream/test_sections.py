"""A state with a right checksum may still hold something else: one error names file and section."""

import json
import random

import pytest
import torch
from toy import Classifier, Task, fit

from lightning_odem import ContinualMergeCallback
from lightning_odem.stream.sections import check_sections
from lightning_odem.stream.store import StreamStateError, StreamStore

pytestmark = pytest.mark.usefixtures("small_stream")


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """The state of a stream of two tasks, as it is read."""
    directory = tmp_path_factory.mktemp("stream")
    module, merge = Classifier(), ContinualMergeCallback(method="ties", dirpath=str(directory), calibration_size=12)
    for number in range(2):
        fit(module, Task(number), merge)
    return StreamStore(directory / "stream").load()


WRONG = [
    ("version", "one"),
    ("base", [1]),
    ("base", {"head.weight": 3}),
    ("merged", None),
    ("merged", {1: torch.zeros(2)}),
    ("task_parameters", {"task_1": None}),
    ("fixed", "head"),
    ("method", []),
    ("dirpath", 3),
    ("started", {"weight": 1.0}),
    ("buffer", {"capacity": 0, "quota": "equal", "seed": 0, "tasks": {}}),
    ("buffer", {"capacity": 4, "quota": "fair", "seed": 0, "tasks": {}}),
    ("buffer", {"capacity": 4, "quota": "equal", "seed": 0, "tasks": {"task_1": {"samples": 3}}}),
    ("buffer", {"capacity": 4}),
    ("random", {"began": "0"}),
    ("random", {"began": "0", "reseeded": False, "state": {}}),
    ("names", {"parameters": "head"}),
    ("settings", None),
    ("fingerprints", {"task_1": 1}),
    ("layout", {"trained": "head"}),
    ("layout", {"trained": [], "transposed": [], "groups": {"conv": "two"}}),
    ("report", []),
    ("report", {}),
]


@pytest.mark.parametrize(
    ("section", "value"), WRONG, ids=[f"{name}-{number}" for number, (name, _) in enumerate(WRONG)]
)
def test_a_section_of_another_kind_is_named_together_with_its_file(state, section, value, tmp_path):
    StreamStore(tmp_path / "stream").save({**state, section: value})
    with pytest.raises(StreamStateError, match=rf"000001\.json is no state of a stream .*: section '{section}' "):
        ContinualMergeCallback(method="ties", dirpath=str(tmp_path))


@pytest.mark.parametrize("section", ["version", "base", "merged", "task_parameters", "report", "method", "buffer"])
def test_a_section_that_is_missing_is_named_and_nothing_older_taken_for_it(state, section, tmp_path):
    store = StreamStore(tmp_path / "stream")
    store.save(state)
    store.save({name: value for name, value in state.items() if name != section})
    with pytest.raises(StreamStateError, match=rf"000002\.json .*: section '{section}' is missing"):
        ContinualMergeCallback(method="ties", dirpath=str(tmp_path))


@pytest.mark.parametrize("section", ["fixed", "random", "names", "settings", "fingerprints"])
def test_a_section_that_earlier_versions_lack_may_be_missing(state, section):
    check_sections({name: value for name, value in state.items() if name != section})


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": ["task_1", "task_1"]},
        {"tasks": ["task_1", 2]},
        {"weights": [1.0]},
        {"accuracy": [[0.5], [0.5]]},
        {"accuracy": [[0.5], [0.5, "high"]]},
        {"merges": []},
        {"fine_tuned": None},
        {"metrics": {"task_1": {"best": 1}}},
    ],
)
def test_a_report_that_contradicts_itself_is_refused(state, change):
    with pytest.raises(ValueError, match="section 'report' "):
        check_sections({**state, "report": {**state["report"], **change}})


def test_a_record_of_a_merge_with_a_value_of_another_kind_is_refused(state):
    merges = list(map(json.loads, state["report"]["merges"]))
    merges[1]["t"] = "half"
    with pytest.raises(ValueError, match="section 'report' has a merge with t='half'"):
        check_sections({**state, "report": {**state["report"], "merges": merges}})


def test_to_check_random_states_draws_no_numbers(state):
    torch.manual_seed(0)
    random.seed(0)
    before = random.getstate(), torch.get_rng_state()
    check_sections(state)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_what_a_method_cannot_take_up_is_named(state, tmp_path):
    StreamStore(tmp_path / "stream").save({**state, "method": {"average": 1, "shares": 2, "factors": 3}})
    with pytest.raises(ValueError, match="Section 'method' of the stream in .* no state of 'task_singular_vectors'"):
        ContinualMergeCallback(method="task_singular_vectors", dirpath=str(tmp_path))

from types import SimpleNamespace

import pytest

from lightning_odem.stream.naming import next_task_name, next_task_weight


@pytest.mark.parametrize(
    ("datamodule", "tasks", "expected"),
    [
        (None, [], "task_1"),
        (SimpleNamespace(), ["a", "b"], "task_3"),
        (SimpleNamespace(task_name="digits"), ["a"], "digits"),
        (SimpleNamespace(task_name=2024), [], "2024"),
    ],
)
def test_name_is_the_datamodules_or_the_number(datamodule, tasks, expected):
    assert next_task_name(datamodule, tasks) == expected


def test_a_task_cannot_come_twice():
    with pytest.raises(ValueError, match="'b' has been merged already, as task 2 of 3"):
        next_task_name(SimpleNamespace(task_name="b"), ["a", "b", "c"])


def test_a_task_in_its_place_of_a_list_has_the_name_of_the_place_unless_it_has_its_own():
    assert next_task_name(None, ["task_2", "task_3"], "task_1") == "task_1"
    assert next_task_name(SimpleNamespace(task_name="digits"), ["task_2"], "task_1") == "digits"


def test_once_tasks_were_taken_out_a_position_is_no_weight():
    assert next_task_weight({"b": 2.0}, None, ["a"], "b", ["c"]) == 2.0
    assert next_task_weight(None, None, ["a"], "b", ["c"]) == 1.0
    with pytest.raises(ValueError, match=r"out of the stream \(c\), so the position of 'b' does not tell"):
        next_task_weight([1.0, 2.0], None, ["a"], "b", ["c"])


@pytest.mark.parametrize(
    ("weights", "datamodule", "expected"),
    [
        (None, None, 1.0),
        (None, SimpleNamespace(), 1.0),
        (None, SimpleNamespace(task_weight=3), 3.0),
        ({"b": 2, "a": 1}, SimpleNamespace(task_weight=3), 2.0),
        ([5, 0], SimpleNamespace(task_weight=3), 0.0),
    ],
)
def test_weight_is_the_users_then_the_datamodules_then_one(weights, datamodule, expected):
    assert next_task_weight(weights, datamodule, ["a"], "b") == expected


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0, "c": 1.0}, "No weight for task 'b'; weights are given for a, c"),
        ([1.0], r"task 2 \('b'\); 1 weights"),
    ],
)
def test_a_task_without_a_given_weight_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        next_task_weight(weights, None, ["a"], "b")


def test_a_name_that_no_file_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"task name '\\ud800' has letters that cannot be written"):
        next_task_name(SimpleNamespace(task_name="\ud800"), [])


@pytest.mark.parametrize("weight", ["heavy", None, [1.0], 10**400], ids=["word", "none", "list", "huge"])
def test_a_weight_that_is_no_number_is_refused_by_its_task(weight):
    with pytest.raises(ValueError, match="utility weight of task 'a' must be a number, got"):
        next_task_weight(None, SimpleNamespace(task_weight=weight), [], "a")

from pathlib import Path

import pytest
import sharded
import torch
from job import run_job
from scripts import run_processes

from lightning_odem.parameters.processes import Processes


def test_a_process_of_no_group_is_alone_and_changes_nothing():
    processes, tensor = Processes.current(), torch.tensor([3.0])
    assert processes == Processes(rank=0, size=1)
    assert processes.sum_(tensor) is processes.broadcast_(tensor) is tensor
    assert tensor.item() == 3.0
    with pytest.raises(KeyError), processes.together():
        raise KeyError


@pytest.mark.slow
def test_an_error_in_one_process_is_raised_in_all_and_they_go_on():
    first, second = run_job(sharded.blocks, 2)
    assert [raised and raised[:2] for raised in first[:4]] == [
        None,
        ("Rare", "here at 1"),
        ("Local", "lost"),
        ("KeyboardInterrupt", ""),
    ]
    assert [raised and raised[:2] for raised in second[:4]] == [
        None,
        ("Rare", "here at 1"),
        ("RuntimeError", "Local: lost"),
        ("KeyboardInterrupt", ""),
    ]
    for received in (first[1], first[3]):
        assert "Raised in process 1 of 2" in received.cause
        assert "in fail\n    raise error" in received.cause
    assert "Raised in process 0 of 2" in second[2].cause
    assert first[4] == ("ValueError", "of process 0", "None")
    assert second[4] == ("ValueError", "of process 1", "None")
    assert first[5:] == second[5:] == [None, 3.0, 5.0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("wait_for_tensor", [False, True])
def test_an_error_reaches_processes_that_wait_in_an_inner_block_or_for_a_tensor(rank, wait_for_tensor):
    raised = run_job(sharded.fail_before_others_enter, 3, rank, wait_for_tensor)
    assert [error[:2] for error in raised] == [("Rare", "outside at 2")] * 3
    assert [error.cause == "None" for error in raised] == [number == rank for number in range(3)]


def test_the_process_that_keeps_the_store_stays_until_all_have_left_the_block():
    run_processes(Path(__file__).parents[1] / "helpers" / "leaving_first.py")

"""Streams of several processes: what they measure, and what becomes of them if one fails."""

import time
from pathlib import Path

import pytest
import torch
from measured import Data, Net, total
from scripts import run_processes, run_script
from torchmetrics.regression import R2Score

from lightning_odem.stream.store import StreamStore

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("what", "message"),
    [("calibration", "ArithmeticError: a cosmic ray"), ("disk", "The state of the stream could not be written")],
)
def test_an_error_in_one_process_ends_all_with_it_and_leaves_the_stream(tmp_path, what, message):
    script = Path(__file__).parents[1] / "helpers" / "failing_process.py"
    started = time.monotonic()
    done = run_script(script, tmp_path, what)  # which starts the second one
    assert done.returncode != 0
    # Both told, neither waited for the other until a timeout of torch.distributed, half an hour.
    assert time.monotonic() - started < 200
    for process in range(2):
        told = tmp_path / f"process-{process}.txt"
        while not told.exists() and time.monotonic() - started < 200:  # the script does not wait for the second one
            time.sleep(0.02)
        assert message in told.read_text()
    assert (tmp_path / "run" / "fine-tuned-02-task_2.ckpt").exists()
    assert StreamStore(tmp_path / "run" / "stream").load()["report"]["tasks"] == ["task_1"]


def test_scores_are_those_of_one_process_in_all_of_them(tmp_path):
    run_processes(Path(__file__).parents[1] / "helpers" / "measured_processes.py", tmp_path)
    first, second = (torch.load(tmp_path / f"{process}.pt") for process in range(2))
    assert first["accuracy"] == second["accuracy"]
    assert first["further"] == second["further"]
    assert first["logged"] == second["logged"]
    module = Net()
    module.load_state_dict(first["module"])
    for number, score in enumerate(first["accuracy"][1]):
        metric, (inputs, targets) = R2Score(), Data(number, total).test_set.tensors
        with torch.no_grad():
            for batch in range(0, 12, 5):
                metric.update(module(inputs[batch : batch + 5]).squeeze(1), targets[batch : batch + 5])
        assert score == pytest.approx(metric.compute().item(), abs=1e-6)
    # Of the three batches of a task the first takes two and the second one and, to keep step, the first of the round.
    assert first["sizes"][-4:] == [5, 2, 5, 2]
    assert second["sizes"][-4:] == [5, 2, 5, 2]

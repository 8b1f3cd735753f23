"""Streams of several processes in which one of them fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_odem.stream.store import StreamStore

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("what", "message"),
    [("calibration", "ArithmeticError: a cosmic ray"), ("disk", "The state of the stream could not be written")],
)
def test_an_error_in_one_process_ends_all_with_it_and_leaves_the_stream(tmp_path, what, message):
    script = Path(__file__).parents[1] / "helpers" / "failing_process.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, script, tmp_path, what], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode != 0
    # Both told, neither waited for the other until a timeout of torch.distributed, half an hour.
    assert time.monotonic() - started < 200
    for process in range(2):
        assert message in (tmp_path / f"process-{process}.txt").read_text()
    assert (tmp_path / "run" / "fine-tuned-02-task_2.ckpt").exists()
    assert StreamStore(tmp_path / "run" / "stream").load()["report"]["tasks"] == ["task_1"]

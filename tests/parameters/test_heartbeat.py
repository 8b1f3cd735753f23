import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from scripts import Script

from lightning_odem.parameters import heartbeat
from lightning_odem.parameters.heartbeat import Heartbeat, LostProcessError

SCRIPT = Path(__file__).parents[1] / "helpers" / "killed_rank.py"


@pytest.fixture
def fast(monkeypatch):
    for name, value in {"BEAT": 0.05, "SILENCE": 0.4, "_LOOK": 0.02}.items():
        monkeypatch.setattr(heartbeat, name, value)


@pytest.fixture
def hearts(fast):
    store = dist.HashStore()
    found = [Heartbeat(store, rank, 3) for rank in range(2)]
    yield found
    for heart in found:
        heart.stop()


def watched(heart, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        heart.check()
        time.sleep(0.02)


def test_processes_that_beat_are_there_and_one_that_has_not_begun_is_not_judged(hearts):
    watched(hearts[0], 1.0)


def test_a_process_that_falls_silent_is_lost_and_named(hearts):
    watched(hearts[0], 0.2)
    hearts[1].stop()
    with pytest.raises(LostProcessError, match=rf"Lost of 3 processes.*: 1 \(process {os.getpid()} on .*\)\. Nothing"):
        watched(hearts[0], 2.0)


def test_a_process_that_nobody_looked_at_for_long_is_not_lost_for_that(hearts):
    hearts[0].check()
    time.sleep(0.6)
    hearts[0].check()


def test_a_beat_ends_with_its_store_and_when_it_is_told_to(fast):
    def beats():
        return sum(thread.name == "lightning_odem heartbeat" for thread in threading.enumerate())

    before = beats()
    heart = Heartbeat(dist.HashStore(), 0, 2)
    assert (beats(), heart.is_mine) == (before + 1, True)
    heart.stop()
    time.sleep(0.3)
    assert (beats(), heart.is_mine) == (before, False)


def run(tmp_path, victim, where, scheme):
    store = f"file://{tmp_path}/store" if scheme == "file" else f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    both = [Script(SCRIPT, store, rank, victim, where) for rank in range(2)]
    return [process.wait(120) for process in both]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["tcp", "file"])
@pytest.mark.parametrize("where", ["block", "sum", "between", "stopped"])
def test_a_killed_process_is_named_by_the_other_one(tmp_path, where, scheme):
    alive, killed = run(tmp_path, 1, where, scheme)
    assert killed.returncode < 0
    found = re.match(
        rf"LostProcessError after (\d+) s: Lost of 2 processes.*: 1 \(process {killed.pid} on", alive.stdout
    )
    assert found, alive.stdout
    assert int(found[1]) < 15


@pytest.mark.slow
@pytest.mark.parametrize("where", ["block", "sum"])
def test_the_loss_of_the_process_with_the_store_is_told_at_once(tmp_path, where):
    _, alive = run(tmp_path, 0, where, "tcp")
    assert re.match(r"LostProcessError after \d s: Lost of 2 processes.*common store", alive.stdout), alive.stdout


@pytest.mark.slow
def test_a_process_that_is_busy_for_longer_is_waited_for(tmp_path):
    assert [ended.stdout for ended in run(tmp_path, 1, "busy", "tcp")] == ["went on", "went on"]

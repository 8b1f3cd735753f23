import errno
import random
import shutil
import signal
import time
import warnings
from itertools import count

import pytest
import torch
from identical import identical
from saving_process import state_of

from lightning_odem.stream.store import StreamStore


def test_a_process_killed_at_any_moment_leaves_one_of_two_states(tmp_path, other_process):
    moments = random.Random(0)
    reached = 0
    for _ in range(25):
        delay = moments.uniform(0.0, 0.05)
        reports, status = other_process.run("save_on_and_on", tmp_path, kill_after=delay)
        assert status == -signal.SIGKILL
        reached = max([reached, *reports])
        state = StreamStore(tmp_path).load()
        number = state["report"]["number"]
        assert number in (reached, reached + 1)
        assert identical(state, state_of(number))
        reached = number
    assert reached >= 25


def test_a_process_killed_at_any_call_leaves_one_of_two_states(tmp_path, other_process):
    StreamStore(tmp_path / "start").save(state_of(1))
    loaded = []
    for call in count(1):
        directory = tmp_path / str(call)
        shutil.copytree(tmp_path / "start", directory)
        status = other_process.run("save_and_die", directory, call)[1]
        store = StreamStore(directory)
        state = store.load()
        loaded.append(state["report"]["number"])
        assert identical(state, state_of(loaded[-1]))
        # The next one to save finds nothing in its way and leaves nothing behind.
        number = store.save(state_of(3, state["base"]))
        names = sorted(path.name.partition("-")[0] for path in directory.iterdir())
        assert names == [f"{number - 1:06d}.json", f"{number:06d}.json", "base", "merged", "merged"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
    # Some calls come before the manifest has its name, some after.
    assert loaded == sorted(loaded)
    assert loaded.count(1) > 8
    assert loaded.count(2) > 3


def check_failures(reports, directory, number):
    *failures, (before, after, loaded), at_last = reports
    assert len(failures) == 3
    for code, message in failures:
        assert code == number
        assert f"could not be written to {directory}" in message
        assert "merged.safetensors" in message
        assert "What was saved there before is intact" in message
    assert before == after
    assert (loaded, at_last) == (1, 3)


def test_a_file_that_grows_too_large_leaves_the_state_before(tmp_path, other_process):
    reports, status = other_process.run("save_too_much", tmp_path, 100_000)
    assert status == 0
    check_failures(reports, tmp_path, errno.EFBIG)


def test_a_full_disk_leaves_the_state_before(other_process):
    if other_process.full_disk is None:
        pytest.skip("needs the right to mount a small file system")
    reports, status = other_process.run("save_too_much", other_process.full_disk / "stream", None)
    assert status == 0
    check_failures(reports, other_process.full_disk / "stream", errno.ENOSPC)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base of 64 MB."""
    directory = tmp_path_factory.mktemp("large")
    StreamStore(directory).save({"base": {"weight": torch.ones(16_000_000)}})
    return directory


@pytest.mark.parametrize("how", ["map", "mapped"])
def test_a_mapped_state_takes_no_memory_before_it_is_used(large, other_process, how):
    ((own, mapped),), status = other_process.run("use_a_section", large, how)
    assert status == 0
    assert own < 8e6
    assert mapped < 16e6


def test_a_loaded_state_is_in_memory(large, other_process):
    ((own, _),), _ = other_process.run("use_a_section", large, "loaded")
    assert own > 60e6


def test_to_save_a_model_takes_no_second_copy_of_it(tmp_path, other_process):
    (rise,), status = other_process.run("save_from_memory", tmp_path, 64)
    assert status == 0
    assert rise < 16e6


def test_a_reader_beside_a_fast_writer_always_finds_a_whole_state(tmp_path, other_process):
    StreamStore(tmp_path).save(state_of(1))
    other_process.start("save_on_and_on", tmp_path, kill_after=1.5)
    end, numbers = time.monotonic() + 1.2, []
    while time.monotonic() < end:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            numbers.append(StreamStore(tmp_path).load()["report"]["number"])
    other_process.wait()
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 10

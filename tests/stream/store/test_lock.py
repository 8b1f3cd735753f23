import json
import os
import signal
import socket
import time

import pytest

from lightning_odem.stream.store import StreamInUseError, StreamLock


def acquire_soon(lock):
    """The system releases a dead process's lock when it has taken the process apart."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return lock.acquire()
        except StreamInUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return json.loads(path.read_text())


def test_another_process_is_refused_with_the_owner_and_let_in_when_it_is_killed(tmp_path, other_process):
    other_process.start("hold_lock", tmp_path / "made" / "lock", 60.0)
    owner = wait_for(tmp_path / "made" / "lock.owner.json")
    lock = StreamLock(tmp_path / "made" / "lock")
    with pytest.raises(StreamInUseError) as refusal:
        lock.acquire()
    for part in (f"process {owner['process']} on {socket.gethostname()} since 2", str(tmp_path / "made")):
        assert part in str(refusal.value)
    os.kill(owner["process"], signal.SIGKILL)
    assert other_process.wait()[1] == -signal.SIGKILL
    acquire_soon(lock)
    assert json.loads((tmp_path / "made" / "lock.owner.json").read_text())["process"] == os.getpid()
    lock.release()


def test_a_process_that_ends_without_releasing_lets_the_next_one_in(tmp_path, other_process):
    assert other_process.run("hold_lock", tmp_path / "lock", 0.0)[1] == 0
    lock = StreamLock(tmp_path / "lock")
    acquire_soon(lock)
    lock.release()


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path, other_process):
    (refusal,), status = other_process.run("fork_with_lock", tmp_path / "lock")
    assert status == 0
    assert "is in use by process" in refusal


def test_two_locks_of_one_process_exclude_each_other(tmp_path):
    first, second = StreamLock(tmp_path / "lock"), StreamLock(tmp_path / "lock")
    first.acquire()
    with pytest.raises(StreamInUseError, match=f"in use by process {os.getpid()} on"):
        second.acquire()
    second.release()
    with pytest.raises(StreamInUseError):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_acquiring_and_releasing_twice_is_harmless(tmp_path):
    lock, other = StreamLock(tmp_path / "lock"), StreamLock(tmp_path / "lock")
    lock.acquire()
    lock.acquire()
    lock.release()
    other.acquire()
    other.release()
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00", b"[]", b"3", b'{"process": 1}', b"[" * 100_000])
def test_an_owner_file_that_says_nothing_is_survived(tmp_path, content):
    lock = StreamLock(tmp_path / "lock")
    lock.acquire()
    owner = tmp_path / "lock.owner.json"
    owner.unlink() if content is None else owner.write_bytes(content)
    with pytest.raises(StreamInUseError, match="process unknown, as lock.owner.json does not name it"):
        StreamLock(tmp_path / "lock").acquire()
    lock.release()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        OSError, match=f"The directory {tmp_path}/file/stream cannot be written: Not a directory"
    ) as error:
        StreamLock(tmp_path / "file" / "stream" / "lock").acquire()
    assert error.value.errno


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_the_right_to_write_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=f"The directory {tmp_path} cannot be written"):
        StreamLock(tmp_path / "lock").acquire()


def test_a_lock_whose_owner_cannot_be_written_is_not_kept(tmp_path):
    (tmp_path / "lock.owner.json").mkdir()
    with pytest.raises(OSError, match=f"The directory {tmp_path} cannot be written"):
        StreamLock(tmp_path / "lock").acquire()
    (tmp_path / "lock.owner.json").rmdir()
    lock = StreamLock(tmp_path / "lock")
    lock.acquire()
    lock.release()

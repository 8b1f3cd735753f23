"""A process that does to a StreamStore what tests ask for on its standard input, each time in a fork of itself.

A request is a line of JSON, ``{"do": name of a function below, "with": [arguments], "kill_after": seconds or null}``,
the time from its first report on;
the answer, another line, is a list of what the function reported until it ended or was killed, and its exit status.
"""

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from lightning_odem.stream.store import StreamLock, StreamStore

Report = Callable[[object], None]
BASE = {"weight": torch.arange(3000.0)}
# What the calls that change a directory or open a file announce themselves as.
AUDITED = ("open", "os.chmod", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir")


def state_of(number: int, base: object = BASE, size: int = 2000) -> dict:
    """A state of which every part but the base tells its number."""
    return {
        "base": base,
        "merged": {"weight": torch.full((size,), float(number)), "bias": torch.tensor(number)},
        "report": {"number": number, "accuracy": [float(number)] * 3, "shape": (number,)},
    }


def save_on_and_on(report: Report, directory: str) -> None:
    store = StreamStore(directory)
    state = store.load()
    reached = 0 if state is None else state["report"]["number"]
    base = BASE if state is None else state["base"]
    for number in count(reached + 1):
        store.save(state_of(number, base))
        report(number)


def save_and_die(report: Report, directory: str, call: int) -> None:
    """Take the stream one state further, but die at the n-th call to the system that Python tells of."""
    calls = count(1)

    def hook(event: str, arguments: tuple) -> None:
        if event in AUDITED and next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    store = StreamStore(directory)
    state = store.load()
    assert state is not None
    sys.addaudithook(hook)
    store.save(state_of(state["report"]["number"] + 1, state["base"]))


def save_too_much(report: Report, directory: str, limit: int | None) -> None:
    """Save a state, fail at a larger one where files may have ``limit`` bytes or the disk is full, try a small one."""
    Path(directory).mkdir(exist_ok=True)
    store = StreamStore(directory)
    store.save(state_of(1))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    before = sorted(os.listdir(directory))
    for _ in range(3):
        try:
            store.save(state_of(2, size=1_000_000))
        except OSError as error:
            report([error.errno, str(error)])
    after = StreamStore(directory).load()
    report([before, sorted(os.listdir(directory)), None if after is None else after["report"]["number"]])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.save(state_of(3))
    report(StreamStore(directory).load()["report"]["number"])  # type: ignore[index]


def use_a_section(report: Report, directory: str, how: str) -> None:
    """Memory of the process in bytes that is its own, and that is files', before and after it has a state."""
    before = _resident()
    store = StreamStore(directory)
    held = store.map("base") if how == "map" else store.load(mapped=how == "mapped")
    report([after - start for start, after in zip(before, _resident(), strict=True)])
    assert held is not None


def save_from_memory(report: Report, directory: str, megabytes: int) -> None:
    """By how many bytes the peak of memory rises when a model of a size is saved."""
    weights = {f"layer{n}": torch.randn(64, 64, 8, 8).to(memory_format=torch.channels_last) for n in range(megabytes)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    StreamStore(directory).save({"base": weights})
    report((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def hold_lock(report: Report, path: str, seconds: float) -> None:
    lock = StreamLock(path)
    lock.acquire()
    time.sleep(seconds)


def fork_with_lock(report: Report, path: str) -> None:
    """Release the lock in a forked child, as a data loader's worker might, then try for it in another object."""
    lock = StreamLock(path)
    lock.acquire()
    if not (child := os.fork()):
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    try:
        StreamLock(path).acquire()
    except RuntimeError as error:
        report(str(error))


def _resident() -> list[int]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(status[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")]


def answer(request: dict) -> list:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        status = 1
        try:
            globals()[request["do"]](
                lambda what: os.write(writing, json.dumps(what).encode() + b"\n"), *request["with"]
            )
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    reports = b""
    deadline = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            deadline = None
            continue
        if not (chunk := os.read(reading, 65536)):
            break
        if not reports and request["kill_after"] is not None:
            deadline = time.monotonic() + request["kill_after"]
        reports += chunk
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # A report cut in two by the end of its process counts for nothing.
    return [[json.loads(line) for line in reports.split(b"\n")[:-1]], status]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
    # Nothing is left to do that would be worth the time that the end of torch takes.
    os._exit(0)

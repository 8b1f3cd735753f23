"""Jobs of several processes, joined by gloo."""

import multiprocessing
import pickle
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

# One process imports what takes long, once; those of jobs and scripts are forks of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lightning.pytorch", "lightning_odem"])


class Raised(NamedTuple):
    """An error, as it can be told to another process."""

    kind: str
    message: str
    cause: str

    @classmethod
    def of(cls, error):
        return cls(type(error).__name__, str(error), str(error.__cause__))


def run_job(function, size, *arguments, timeout=60):
    """What ``function(*arguments)`` returned, or :class:`Raised`, in each of ``size`` processes."""
    for _ in range(3):
        with suppress(_NotJoinedError):
            return _run_once(function, size, arguments, timeout)
    raise AssertionError("gloo could not join the processes")


class _NotJoinedError(Exception):
    """Gloo has lost a connection before the function was called, which happens on a busy machine."""


def _run_once(function, size, arguments, timeout):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        jobs = [
            CONTEXT.Process(target=_run, args=(function, rank, size, directory, arguments), daemon=True)
            for rank in range(size)
        ]
        for job in jobs:
            job.start()
        deadline = time.monotonic() + timeout
        for job in jobs:
            job.join(max(deadline - time.monotonic(), 0.0))
        running = [rank for rank, job in enumerate(jobs) if job.is_alive()]
        for job in jobs:
            job.kill()
            job.join()
        joined = [(directory / f"joined-{rank}").exists() for rank in range(size)]
        if not running and not any(joined):
            raise _NotJoinedError
        assert not running, f"processes {running} of {size} were still running after {timeout} s"
        assert [job.exitcode for job in jobs] == [0] * size
        return [pickle.loads((directory / str(rank)).read_bytes()) for rank in range(size)]


def _run(function, rank, size, directory, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory / 'rendezvous'}", rank=rank, world_size=size)
    dist.barrier()
    (directory / f"joined-{rank}").touch()
    try:
        result = function(*arguments)
    except Exception as error:
        result = Raised.of(error)
    (directory / str(rank)).write_bytes(pickle.dumps(result))

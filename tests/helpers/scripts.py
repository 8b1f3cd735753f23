"""Python scripts in processes of their own, forks of one that has imported what takes long."""

import os
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from entry_points import read_once
from job import CONTEXT


class Ended(NamedTuple):
    """How a process ended: by a signal if its status is below 0."""

    pid: int
    returncode: int
    stdout: str
    stderr: str


class Script:
    """A process that does what ``python path *arguments`` does, or ``python -m module *arguments``."""

    def __init__(self, path, *arguments, cwd=None, environment: Mapping[str, str] | None = None) -> None:
        self._outputs = tempfile.TemporaryDirectory()
        files = [Path(self._outputs.name) / name for name in ("stdout", "stderr")]
        self._stdout, self._stderr = files
        for file in files:
            file.touch()
        told = [str(path), *map(str, arguments)], cwd or Path.cwd(), {**os.environ, **(environment or {})}, files
        self._process = CONTEXT.Process(target=_run, args=told)
        self._process.start()
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """As of :class:`Ended`; None while the script runs."""
        return self._process.exitcode

    def wait_for(self, text: str, seconds: float = 100.0) -> None:
        """Wait until the script has printed a text."""
        deadline = time.monotonic() + seconds
        while text not in self._stdout.read_text():
            assert self._process.is_alive(), self._stderr.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait(self, seconds: float = 300.0) -> Ended:
        """Wait until the process has ended; kill it and fail if it has not."""
        self._process.join(seconds)
        ran = self._process.is_alive()
        self.kill()
        ended = Ended(self.pid, self._process.exitcode, self._stdout.read_text(), self._stderr.read_text())
        self._outputs.cleanup()
        assert not ran, f"{ended.stdout}{ended.stderr}\nwas still running after {seconds} s"
        return ended

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def run_script(path, *arguments, **options) -> Ended:
    """Run a script to its end."""
    return Script(path, *arguments, **options).wait()


def run_processes(path, *arguments, size: int = 2, cwd=None, seconds: float = 300.0) -> None:
    """Run a script in several processes that train together, as ``torchrun`` does; all have to succeed."""
    common = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(size)}
    scripts = [
        Script(path, *arguments, cwd=cwd, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    deadline = time.monotonic() + seconds
    while None in (found := [script.status for script in scripts]) and not any(found) and time.monotonic() < deadline:
        time.sleep(0.02)
    failed = [script for script in scripts if script.status]
    for script in scripts:
        script.kill()
    for script in failed + scripts:  # the others may only have waited for one that failed
        ended = script.wait()
        assert ended.returncode == 0, f"ended with {ended.returncode}: {ended.stderr[-4000:]}"


def _run(command, directory, environment, outputs) -> None:
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    torch.set_num_threads(1)
    read_once()
    if command[0] == "-m":
        sys.argv[:] = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "helpers" / "saving_process.py"


class OtherProcess:
    """Runs the functions of ``helpers/saving_process.py``, each in a process of its own."""

    def __init__(self, command: list[str], full_disk: Path | None) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "ready\n"
        # A directory of 300 KiB, or None where no such file system can be mounted.
        self.full_disk = full_disk

    def run(self, what: str, *arguments: Any, kill_after: float | None = None) -> tuple[list[Any], int]:
        self.start(what, *arguments, kill_after=kill_after)
        return self.wait()

    def start(self, what: str, *arguments: Any, kill_after: float | None = None) -> None:
        request = {"do": what, "with": [*map(str_of_path, arguments)], "kill_after": kill_after}
        print(json.dumps(request), file=self._process.stdin, flush=True)

    def wait(self) -> tuple[list[Any], int]:
        reports, status = json.loads(self._process.stdout.readline())
        return reports, status

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def str_of_path(argument: Any) -> Any:
    return str(argument) if isinstance(argument, Path) else argument


@pytest.fixture(scope="session")
def other_process(tmp_path_factory):
    command = [sys.executable, str(SCRIPT)]
    disk = tmp_path_factory.mktemp("disk")
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=300k tmpfs "$0" && exec "$@"']
    can_mount = shutil.which("unshare") and not subprocess.run([*mount, disk, "true"], capture_output=True).returncode
    process = OtherProcess([*mount, str(disk), *command], disk) if can_mount else OtherProcess(command, None)
    yield process
    process.end()

"""Streams that are killed at one point after another and started again: run as a script, prints what was lost as JSON.

Each stream runs in a fork of this process, which has imported everything already and run a stream, since a first one
takes longer. Points are calls of functions of the package and operations on files, in the order in which a stream makes
them that has no accident.

Arguments: how many of the calls, evenly spaced, and (optional) to take only every so many of the operations on files.
"""

import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from figures import leave_figures_out
from identical import identical
from toy import Classifier, Task, everything, fit

import lightning_odem
from lightning_odem import ContinualMergeCallback
from lightning_odem.stream.store import StreamStore

PACKAGE = str(Path(lightning_odem.__file__).parent)
FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
TASKS = 3


def stream() -> None:
    L.seed_everything(3, verbose=False)
    module = Classifier(dropout=0.2, batch_norm=True)
    merge = ContinualMergeCallback(dirpath="stream", calibration_size=12)
    for task in merge.remaining([Task(number, shuffle=True) for number in range(TASKS)]):
        fit(module, task, merge, max_epochs=1)
    torch.save(everything(module), "module.pt")


def forked(directory: Path, dies_at: int | None = None, log: bool = False) -> bool:
    """Run the stream in a process of its own; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            directory.mkdir(exist_ok=True)
            os.chdir(directory)
            os.dup2(os.open("log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
            points = count_points(dies_at)
            stream()
            if log:
                Path("points.json").write_text(json.dumps(points))
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, (directory / "log.txt").read_text()[-3000:]
    return True


def count_points(dies_at: int | None) -> list[str]:
    points: list[str] = []

    def see(point: str) -> None:
        points.append(point)
        if len(points) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def called(frame, event, argument) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            see(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")

    def audited(event: str, arguments: tuple) -> None:
        inside = event in FILES and isinstance(arguments[0], (str, os.PathLike)) and "stream" in str(arguments[0])
        if inside and (event != "open" or arguments[1] not in ("r", "rb")):
            see(f"{event} {Path(arguments[0]).name}")

    sys.addaudithook(audited)
    sys.settrace(called)  # None in return: no lines; a profiler would see the end of each call too, and those of C
    return points


def outcome(directory: Path) -> dict:
    """All that a stream leaves but the seconds it took, and where it lies."""
    here = Path.cwd()
    os.chdir(directory)
    try:
        state = StreamStore(Path("stream/stream")).load()
        assert state is not None
        report = json.loads(Path("stream/report.json").read_text())
        state["dirpath"] = Path(state["dirpath"]).name
        state["report"]["merges"] = [json.loads(record) for record in state["report"]["merges"]]
        for record in (*state["report"]["merges"], *report["merges"]):
            record |= dict.fromkeys(("merge_seconds", "gradient_seconds", "evaluation_seconds"), 0.0)
            record["checkpoint"] = record["checkpoint"] and Path(record["checkpoint"]).name
        weights = [torch.load(path)["state_dict"] for path in sorted(Path("stream").glob("*.ckpt"))]
        files = sorted(path.name for path in Path("stream").iterdir())
        return {"state": state, "report": report, "weights": weights, "files": files}
    finally:
        os.chdir(here)


def main(calls: int, every: int = 1) -> None:
    leave_figures_out()  # a figure is written like the table
    root = Path(tempfile.mkdtemp())
    (root / "first").mkdir()
    os.chdir(root / "first")
    stream()
    assert forked(root / "whole", log=True)
    expected = outcome(root / "whole")
    points = json.loads((root / "whole" / "points.json").read_text())
    on_files = [number for number, point in enumerate(points, start=1) if " " in point]
    step = max(len(points) // calls, 1)
    tried, lost = sorted({*on_files[::every], *range(1, len(points) + 1, step)}), []
    for number in tried:
        directory = root / str(number)
        died = not forked(directory, dies_at=number)
        # Half of them are killed once more while they recover.
        again = random.Random(number)
        while died and again.random() < 0.5:
            died = not forked(directory, dies_at=again.randrange(1, len(points)))
        if died:
            forked(directory)
        found = outcome(directory)
        differ = [key for key in expected if not identical(found[key], expected[key])]
        lost += [f"{number} {points[number - 1]}: {key} differ" for key in differ]
    print(json.dumps({"points": len(points), "tried": len(tried), "on_files": len(on_files), "lost": lost}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

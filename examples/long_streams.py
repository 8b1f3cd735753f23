"""What one more task costs in a long stream: processor time, bytes of state and report, files and memory.

Each task is one step of a small network, with a new Trainer and the same callback, so what a stream adds to each task
is not hidden by the training. By default nothing is measured, since measuring all earlier tasks takes time in
proportion to their number; ``--evaluate last`` and ``--evaluate every`` show that.

Run it with ``python examples/long_streams.py``; a thousand tasks by ``average`` take two minutes, two hundred by
``ode`` two. It downloads nothing.
"""

import argparse
import logging
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem import ContinualMergeCallback

SHOWN = (10, 20, 50, 100, 200, 500, 1000)
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Task(L.LightningDataModule):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.task_name = f"task {number}"
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(number))
        self.samples = TensorDataset(inputs, inputs[:, :4].argmax(1))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, batch_size=64)

    test_dataloader = train_dataloader


def run(directory: Path, count: int, method: str, evaluate: str | bool) -> Iterator[list[float]]:
    """Number of tasks, seconds per task, kB of the state and of the report, files, and MB of memory."""
    model, seconds = Classifier(), []
    merge = ContinualMergeCallback(method, dirpath=str(directory), evaluate=evaluate)
    for number, task in enumerate(merge.remaining(map(Task, range(1, count + 1))), start=1):
        started = time.process_time()
        L.Trainer(max_steps=1, callbacks=[merge], enable_model_summary=False, **QUIET).fit(model, datamodule=task)
        seconds.append(time.process_time() - started)
        if number in (*SHOWN, count):
            files = [path for path in directory.rglob("*") if path.is_file()]
            state = sum(path.stat().st_size for path in files if path.parent.name == "stream")
            report = (directory / "report.json").stat().st_size
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            yield [number, statistics.median(seconds[-10:]), state / 1000, report / 1000, len(files), memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    runs = {"average": 1000, "ode": 200}
    parser.add_argument("--run", nargs=2, action="append", metavar=("METHOD", "TASKS"), help=f"by default {runs}")
    parser.add_argument("--evaluate", choices=["none", "last", "every"], default="none")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    names = ["tasks", "s / task", "state (kB)", "report (kB)", "files", "peak memory (MB)"]
    evaluate = False if given.evaluate == "none" else given.evaluate
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = dict(zip((1, 2, 3, 5), figure.subplots(1, 4), strict=True))
    for method, count in given.run or runs.items():
        with tempfile.TemporaryDirectory() as folder:
            rows = list(run(Path(folder), int(count), method, evaluate))
        table = Table(*names, title=method)
        for row in rows:
            table.add_row(*(f"{value:.4g}" for value in row))
        Console().print(table)
        columns = list(zip(*rows, strict=True))
        for index, axes in panels.items():
            axes.plot(columns[0], columns[index], marker="o", label=method)
            axes.set(xlabel="tasks", ylabel=names[index])
    for axes in panels.values():
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    panels[1].legend(loc="center right")
    figure.savefig("long_streams.png", dpi=100)


if __name__ == "__main__":
    main()

"""Which strategies and precisions a stream of two tasks runs under on this machine; all, or the strategies named."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem import ContinualMergeCallback

PROCESSES = {"auto": [1], "ddp": [1, 2], "fsdp": [2], "model_parallel": [2]}
PROCESSES |= dict.fromkeys(("deepspeed", "ddp_spawn", "ddp_notebook"), [1])
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "transformer-engine")
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16))

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.layers, FSDPModule):
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def forward(self, inputs):
        return self.layers(inputs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def attempt(precision, accelerator, strategy, devices):
    """Fit and merge two tasks; what came of it in one line."""
    data = DataLoader(TensorDataset(torch.arange(512.0).sin().view(32, 16), torch.arange(32) % 16), batch_size=8)
    try:
        module, merge = Classifier(), ContinualMergeCallback(dirpath=precision)
        options = {"precision": precision, "accelerator": accelerator, "devices": devices, "callbacks": [merge]}
        for _ in range(2):
            sharded = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
            options["strategy"] = sharded if strategy == "model_parallel" else strategy
            trainer = L.Trainer(max_epochs=1, **options, **QUIET)
            trainer.fit(module, data, data)
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]  # of a process that was started a traceback
        return lines[-1] if "-- Process" in lines[0] else f"{type(error).__name__}: {lines[0]}"
    if len(merge.report.tasks) < 2:
        return "The stream was lost: it holds no task after fit."
    return "works" if trainer.precision == precision else f"works, but Lightning makes it {trainer.precision}."


def worker(path, accelerator, strategy, devices, *precisions):
    """Try one strategy. Lightning starts its other processes with the same arguments."""
    for precision in precisions:
        found = attempt(precision, accelerator, strategy, int(devices))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with open(path, "a") as file:
                file.write(json.dumps([precision, found]) + "\n")


def outcomes(row, precisions=PRECISIONS, seconds=300):
    """What comes of each precision; a process that crashes or hangs costs only the one it was at."""
    found = {}
    while left := [precision for precision in precisions if precision not in found]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "outcomes")
            command = [sys.executable, Path(__file__).resolve(), "--worker", path, *map(str, row), *left]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
            process = subprocess.Popen(command, start_new_session=True, **quiet)
            try:
                end = f"The process ended with status {process.wait(seconds)}."
            except subprocess.TimeoutExpired:
                end = f"No end within {seconds} s."
                os.killpg(process.pid, signal.SIGKILL)  # with the processes it started
            found |= dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}
            found |= dict.fromkeys([precision for precision in left if precision not in found][:1], end)
    return found


def main(strategies):
    machine = {"cpu": 2} | ({"gpu": torch.cuda.device_count()} if torch.cuda.is_available() else {})
    rows = [(a, s, n) for a, most in machine.items() for s in strategies for n in {min(n, most) for n in PROCESSES[s]}]
    table, notes = Table("accelerator", "strategy", "processes", *PRECISIONS), {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for row, found in zip(rows, pool.map(outcomes, rows), strict=True):
            marks = ["" if f == "works" else f"({notes.setdefault(f, len(notes) + 1)})" for f in found.values()]
            works = ["works" if f.startswith("works") else "" for f in found.values()]
            table.add_row(*map(str, row), *(" ".join(filter(None, cell)) for cell in zip(works, marks, strict=True)))
    Console(width=140).print(table)
    print(*(f"({number}) {note}" for note, number in notes.items()), sep="\n")


if __name__ == "__main__":
    worker(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main(sys.argv[1:] or PROCESSES)

"""A stream of two processes with a module to which Lightning gives shards and memory: run as a script, twice.

Its body is on the meta device until then, and the heads of its tasks are made in configure_model. The first run fits
one stream to its end and begins another, with which the second run goes on.
"""

import sys
from pathlib import Path

import torch
from figures import leave_figures_out
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from toy import Classifier, Task, make_trainer

from lightning_odem import ContinualMergeCallback
from lightning_odem.parameters.snapshot import gather_snapshot, load_snapshot, take_snapshot

TASKS = 3


class Late(Classifier):
    task_specific = ("heads",)

    def __init__(self, merge):
        super().__init__()
        self.base = take_snapshot(self.body)
        self.merge = merge
        self.head = None
        self.body.to("meta")

    def configure_model(self):
        if not isinstance(self.body, FSDPModule):
            with torch.device("meta"):
                self.heads = nn.ModuleDict({f"task_{number + 1}": nn.Linear(8, 3) for number in range(TASKS)})
            for part in (self.body, *self.heads.values()):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def on_fit_start(self):
        if self.merge.report.tasks:
            self.merge.load_base(self)
        else:
            load_snapshot(self.body, self.base, lambda name: True)
            for head in self.heads.values():
                for parameter in head.parameters():
                    nn.init.constant_(parameter, 0.1)

    def forward(self, inputs):
        return self.heads[self.task](self.body(inputs))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def calibration_step(self, batch, task):
        return nn.functional.cross_entropy(self.heads[task](self.body(batch[0])), batch[1])

    def prediction_step(self, batch, task):
        return self.heads[task](self.body(batch[0])), batch[1]


def fit(directory: Path, stop_after: int = TASKS) -> None:
    merge = ContinualMergeCallback(dirpath=str(directory))
    module = Late(merge)
    tasks = merge.remaining([Task(number, f"task_{number + 1}", batch_size=4) for number in range(TASKS)])
    for _, task in zip(range(stop_after), tasks, strict=False):
        module.task = task.task_name
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
        trainer = make_trainer(merge, strategy=strategy, devices=2)
        trainer.fit(module, datamodule=task)
    tensors = dict(gather_snapshot(module, take_snapshot(module)))
    if trainer.is_global_zero:
        torch.save({"tensors": tensors, "accuracy": merge.report.accuracy}, directory / "end.pt")


def main(directory: Path) -> None:
    leave_figures_out()
    if (directory / "parts").exists():
        fit(directory / "parts")
    else:
        fit(directory / "whole")
        fit(directory / "parts", stop_after=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

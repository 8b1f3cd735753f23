"""Streams of two processes that share every parameter, those of the head excluded: run as a script, twice.

The first run fits each stream to its end and begins another like it, with which the second run goes on: from its
directory, one of them also from a checkpoint in mid-task.
"""

import sys
from itertools import product
from pathlib import Path

import torch
from figures import leave_figures_out
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from toy import Classifier, Failing, Task, make_trainer

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods import AverageMerge, MergeResult, ODEMerge
from lightning_odem.methods.needs import Snapshots
from lightning_odem.parameters.snapshot import gather_snapshot, take_snapshot

TASKS = 3
EXCLUSIONS, PRECISIONS = ("frozen", "trained"), ("32-true", "bf16-true", "bf16-mixed")


class Sharded(Classifier):
    """Its head has three rows: two for the first process, one for the second."""

    def __init__(self, frozen):
        super().__init__()
        self.head.requires_grad_(not frozen)

    def configure_model(self):
        if not isinstance(self.body, FSDPModule):
            for part in (self.body, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class MeanOfRun(AverageMerge):
    """Averages the weights of a training run, of which each process has its shards, into the merged model."""

    needs = (Snapshots(),)
    sharded = True

    def merge(self, merged, incoming, t, context):
        return MergeResult(merged.lerp_(torch.stack([*context[Snapshots], incoming]).mean(0), t))


def start(*callbacks, **options):
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    return make_trainer(*callbacks, strategy=strategy, devices=2, **options)


def save(trainer, module, merge, directory):
    tensors = dict(gather_snapshot(module, take_snapshot(module)))
    if trainer.is_global_zero:
        torch.save({"tensors": tensors, "accuracy": merge.report.accuracy}, directory / "end.pt")


def fit(directory: Path, exclusion: str, precision: str, stop_after: int = TASKS) -> None:
    offload = "disk" if precision == "bf16-true" else "cpu"
    options = {"exclude": ["head"], "calibration_size": 12, "offload": offload}
    # A method that keeps shards from merge to merge.
    merge = ContinualMergeCallback(ODEMerge(descent=0.01), dirpath=str(directory), **options)
    module = Sharded(exclusion == "frozen")
    tasks = merge.remaining([Task(number, f"task_{number + 1}", batch_size=4) for number in range(TASKS)])
    for _, task in zip(range(stop_after), tasks, strict=False):
        trainer = start(merge, precision=precision, max_epochs=1)
        trainer.fit(module, datamodule=task)
    save(trainer, module, merge, directory)


def fit_in_parts(directory: Path, part: int | None = None) -> None:
    """Fit two tasks: both, or all but the merge of the second, or that merge."""
    merge = ContinualMergeCallback(MeanOfRun(), exclude=["head"], dirpath=str(directory))
    module, saved = Sharded(frozen=True), directory.with_name("saved")
    if part != 1:
        start(merge).fit(module, datamodule=Task(0, batch_size=4))
    if part == 0:
        cut, checkpoint = Failing("on_train_end", RuntimeError("power cut")), ModelCheckpoint(saved, save_last=True)
        try:
            start(cut, merge, checkpoint, enable_checkpointing=True).fit(module, datamodule=Task(1, batch_size=4))
        except RuntimeError as error:
            assert "power cut" in str(error)  # noqa: PT017
        return
    merge.evaluation_data["task_1"] = Task(0)
    trainer = start(merge)
    trainer.fit(module, datamodule=Task(1, batch_size=4), ckpt_path=saved / "last.ckpt" if part == 1 else None)
    save(trainer, module, merge, directory)


def main(directory: Path) -> None:
    leave_figures_out()
    whole, parts = directory / "whole", directory / "parts"
    resumed = parts.exists()
    for case in product(EXCLUSIONS, PRECISIONS):
        if not resumed:
            fit(whole / "-".join(case), *case)
        fit(parts / "-".join(case), *case, stop_after=TASKS if resumed else 1)
    if not resumed:
        fit_in_parts(whole / "mid-task")
    fit_in_parts(parts / "mid-task", part=int(resumed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

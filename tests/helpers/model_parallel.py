"""Streams of two processes that share every parameter, and of two that each hold all of them: run as a script."""

import sys
from pathlib import Path

import torch
from figures import leave_figures_out
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy import Classifier, Failing, Task, make_trainer

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods import ClosedFormMerge, ODEMerge, TaskSingularVectorsMerge
from lightning_odem.parameters.snapshot import gather_snapshot, take_snapshot


class Sharded(Classifier):
    """Its head has three rows: two for the first process, one for the second."""

    def configure_model(self):
        if not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            for part in (self.body, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


METHODS = {
    "ode": lambda: ODEMerge(descent=0.01),  # above 0 with a state, shards of which are saved whole
    "closed_form": lambda: ClosedFormMerge(measured=0.5),
    "task_singular_vectors": TaskSingularVectorsMerge,
}


def main(directory: Path, name: str) -> None:
    leave_figures_out()
    method = METHODS[name]()
    options = {"calibration_size": 12}  # of 24 samples a task
    for kind, strategy, kind_of_module in (
        ("whole", lambda: "ddp", Classifier),
        ("shards", lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False), Sharded),
    ):
        module = kind_of_module(batch_norm=False)
        merge = ContinualMergeCallback(method, dirpath=str(directory / kind), **options)
        for number in range(2):
            trainer = make_trainer(merge, strategy=strategy(), devices=2)
            trainer.fit(module, datamodule=Task(number, batch_size=4))
        assert isinstance(module.head.weight, DTensor) == (kind == "shards")
        merged = dict(gather_snapshot(module, take_snapshot(module)))
        # A third task that new processes' callbacks take up from the directory, and end in mid-task.
        module, merge = (
            kind_of_module(batch_norm=False),
            ContinualMergeCallback(method, dirpath=str(directory / kind), **options),
        )
        saved = ModelCheckpoint(directory / f"{kind}-task", save_last=True)
        cut = Failing("on_train_end", RuntimeError("power cut"))
        trainer = make_trainer(cut, merge, saved, strategy=strategy(), devices=2, enable_checkpointing=True)
        try:
            trainer.fit(module, datamodule=Task(2, batch_size=4))
        except RuntimeError as error:
            assert "power cut" in str(error)  # noqa: PT017
        module, merge = (
            kind_of_module(batch_norm=False),
            ContinualMergeCallback(method, dirpath=str(directory / kind), **options),
        )
        merge.evaluation_data = merge.evaluation_data | {f"task_{number + 1}": Task(number) for number in range(2)}
        trainer = make_trainer(merge, strategy=strategy(), devices=2)
        trainer.fit(module, datamodule=Task(2, batch_size=4), ckpt_path=directory / f"{kind}-task" / "last.ckpt")
        resumed = dict(gather_snapshot(module, take_snapshot(module)))
        state = {"merged": merged, "resumed": resumed, "tasks": merge.report.tasks, "path": merge.report.merges[1].path}
        torch.save(state, directory / f"{kind}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

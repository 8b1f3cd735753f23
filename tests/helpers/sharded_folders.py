"""Checkpoints that two processes write in shards: run as a script with the kind and the folder to write.

Lightning lets FSDPStrategy and DeepSpeedStrategy run on GPUs only; the subclasses here run them on the CPU.
"""

import sys

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, ParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from toy import Classifier, Task, make_trainer


class Module(Classifier):
    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for part in (self.body, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


class FSDPOnCPU(FSDPStrategy):
    def _setup_model(self, model):
        cpu = torch.device("cpu")
        wrapped = any(isinstance(part, FullyShardedDataParallel) for part in model.modules())
        return model if wrapped else FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)


class DeepSpeedOnCPU(DeepSpeedStrategy):
    def setup_environment(self):
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self):
        self._process_group_backend = "gloo"
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        parameters = list(model.parameters())
        return deepspeed.initialize(
            model=model, model_parameters=parameters, optimizer=optimizer, config=self.config, dist_init_required=False
        )[:2]


def main(kind: str, folder: str) -> None:
    if kind.startswith("deepspeed"):
        strategy = DeepSpeedOnCPU(stage=int(kind[-1]), process_group_backend="gloo", zero_allow_untested_optimizer=True)
        strategy.config["train_micro_batch_size_per_gpu"] = 12
    else:
        strategy = ModelParallelStrategy(2, 1)
        if kind == "fsdp":
            strategy = FSDPOnCPU(state_dict_type="sharded", process_group_backend="gloo")
    trainer = make_trainer(strategy=strategy, devices=2)
    trainer.fit(Module(), datamodule=Task(0, batch_size=12))
    trainer.save_checkpoint(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])

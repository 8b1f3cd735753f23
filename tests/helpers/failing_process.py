"""A stream of two processes, in one of which something fails: run as a script."""

import sys
from pathlib import Path

import lightning as L
import torch
from toy import Classifier, Task, make_trainer

from lightning_odem import ContinualMergeCallback


class Fragile(Classifier):
    broken = False

    def calibration_step(self, batch, task):
        if self.broken and self.global_rank == 1:
            raise ArithmeticError("a cosmic ray")
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


class Breaking(L.Callback):
    def on_train_end(self, trainer, pl_module):
        pl_module.broken = True


def main(directory: Path, what: str) -> None:
    module, merge = Fragile(), ContinualMergeCallback(dirpath=str(directory / "run"), calibration_size=12)
    callbacks = [merge]
    for number in range(2):
        if number == 1 and what == "calibration":
            callbacks.insert(0, Breaking())
        trainer = make_trainer(*callbacks, strategy="ddp", devices=2)
        if number == 1 and what == "disk" and trainer.global_rank == 0:
            (directory / "run" / "stream" / "drafts").write_text("in the way of every write")
        try:
            trainer.fit(module, datamodule=Task(number, batch_size=4))
        except BaseException as error:
            (directory / f"process-{trainer.global_rank}.txt").write_text(f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

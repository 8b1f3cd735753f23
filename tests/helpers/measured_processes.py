"""A stream of regressions fitted by two processes: run as a script by the tests, which read what it writes."""

import sys
from pathlib import Path

import torch
from measured import Data, Net, total
from torchmetrics import MetricCollection
from torchmetrics.regression import MeanAbsoluteError, R2Score
from toy import make_trainer

from lightning_odem import ContinualMergeCallback


def metric(task):
    """What the tasks are measured by."""
    return MetricCollection([R2Score(), MeanAbsoluteError()])


SIZES = []


class Counting(Net):
    """Notes the batches that go through it in evaluations."""

    def prediction_step(self, batch, task):
        SIZES.append(len(batch[0]))
        return self(batch[0]), batch[1]


def main(directory: Path) -> None:
    module, merge = Counting(), ContinualMergeCallback("average", dirpath=str(directory / "run"))
    for number in range(2):
        trainer = make_trainer(merge, strategy="ddp", devices=2)
        SIZES.clear()
        trainer.fit(module, datamodule=Data(number, total, metric, batch_size=4))
    state = {
        "accuracy": merge.report.accuracy,
        "further": merge.report.merges[-1].further,
        "logged": trainer.callback_metrics["merge/R2Score"].item(),
        "module": module.state_dict(),
        "sizes": SIZES,
    }
    torch.save(state, directory / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

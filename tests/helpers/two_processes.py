"""Streams fitted by two processes: run as a script by the tests, which read what it writes."""

import sys
from pathlib import Path

import torch
from toy import Classifier, Incoming, Task, everything, make_trainer

from lightning_odem import ContinualMergeCallback


def main(directory: Path) -> None:
    for finetune_from in ("base", "merged"):
        module, incoming = Classifier(batch_norm=True), Incoming()
        merge = ContinualMergeCallback(finetune_from=finetune_from, dirpath=str(directory / finetune_from))
        merged = []
        for number in range(2):
            # Three batches of four for each process. A validation would level the batch-norm statistics.
            trainer = make_trainer(incoming, merge, strategy="ddp", devices=2, limit_val_batches=0)
            trainer.fit(module, datamodule=Task(number, batch_size=4))
            merged.append(everything(module))
        state = {
            "starts": incoming.starts,
            "incoming": incoming.models,
            "steps": incoming.steps,
            "merged": merged,
            "accuracy": merge.report.accuracy,
            "process": trainer.global_rank,
        }
        torch.save(state, directory / f"{finetune_from}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A stream of tasks in plain Python: one fit per task, one merged model at the end.

Run it with ``python examples/plain_loop.py``; it takes about a minute on two CPU cores and downloads nothing.
"""

import lightning as L

from lightning_odem import ContinualMergeCallback, TaskClassifier
from lightning_odem.classifiers.pretraining import pretrain
from lightning_odem.tasks import DigitsStream


def main() -> None:
    L.seed_everything(0)
    stream = DigitsStream(tasks=["rotated", "inverted", "slanted", "striped"])
    model = TaskClassifier("test_vit", backbone_args={"in_chans": 1, "img_size": 32}, lr=3e-4)
    pretrain(model, stream.pretraining, max_epochs=10)  # stands in for the pretrained weights of a larger model

    merge = ContinualMergeCallback(calibration_size=256)
    for task in stream:
        trainer = L.Trainer(
            max_epochs=3, callbacks=[merge], logger=False, enable_checkpointing=False, enable_model_summary=False
        )
        trainer.fit(model, datamodule=task)  # fine-tunes from the base model, then merges
    print(merge.table())

    # The module is the merged model now. Each task's test set, with the head of that task:
    for task in stream:
        trainer = L.Trainer(logger=False, enable_progress_bar=False)
        trainer.test(model, datamodule=task)
    print(f"Merged weights: {merge.last_merged_path}")


if __name__ == "__main__":
    main()

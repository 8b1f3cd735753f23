"""Deploy one model for tasks of which one matters most: give that task a larger utility weight.

The same stream is merged twice, with equal weights and with a first task that counts four times as much. The last lines
are what this gains on that task and costs on the others. Run it with ``python
examples/deploy_for_important_tasks.py``; it takes about a minute on two CPU cores and downloads nothing.
"""

import copy

import lightning as L

from lightning_odem import ContinualMergeCallback, ContinualTrainer, TaskClassifier
from lightning_odem.classifiers.pretraining import pretrain
from lightning_odem.tasks import DigitsStream

TASKS = ["rotated", "inverted", "slanted"]


def run(base: TaskClassifier, weights: dict[str, float]) -> ContinualMergeCallback:
    L.seed_everything(0)
    merge = ContinualMergeCallback(weights=weights, calibration_size=256)
    trainer = ContinualTrainer(
        max_epochs=3, callbacks=[merge], logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit_tasks(copy.deepcopy(base), DigitsStream(tasks=TASKS))
    return merge


def main() -> None:
    L.seed_everything(0)
    base = TaskClassifier("test_vit", backbone_args={"in_chans": 1, "img_size": 32}, lr=3e-4)
    pretrain(base, DigitsStream().pretraining, max_epochs=10)
    equal = run(base, dict.fromkeys(TASKS, 1.0))
    skewed = run(base, {"rotated": 4.0, "inverted": 1.0, "slanted": 1.0})
    final = {}
    for name, merge in (("equal weights", equal), ("rotated counts four times", skewed)):
        times = ", ".join(f"{record.t:.2f}" for record in merge.report.merges)
        final[name] = [100 * accuracy for accuracy in merge.report.accuracy[-1]]
        scores = ", ".join(f"{task} {accuracy:.1f}" for task, accuracy in zip(TASKS, final[name], strict=True))
        print(f"{name}: operating times {times}; accuracy (%) {scores}")
    first, *others = (after - before for before, after in zip(*final.values(), strict=True))
    print(f"Counting four times changes rotated by {first:+.1f} points,")
    print(f"the others by {sum(others) / len(others):+.1f} points in the mean.")


if __name__ == "__main__":
    main()

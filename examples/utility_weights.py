"""Tasks that do not count the same: the utility weight of a task is its share of the merged model.

The same stream is merged twice, with equal weights and with a first task that counts four times as much. Run it with
``python examples/utility_weights.py``; it takes about a minute on two CPU cores and downloads nothing.
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
    trainer = ContinualTrainer(max_epochs=3, callbacks=[merge], logger=False, enable_model_summary=False)
    trainer.fit_tasks(copy.deepcopy(base), DigitsStream(tasks=TASKS))
    return merge


def main() -> None:
    L.seed_everything(0)
    base = TaskClassifier("test_vit", backbone_args={"in_chans": 1, "img_size": 32}, lr=3e-4)
    pretrain(base, DigitsStream().pretraining, max_epochs=10)
    equal = run(base, dict.fromkeys(TASKS, 1.0))
    skewed = run(base, {"rotated": 4.0, "inverted": 1.0, "slanted": 1.0})
    for name, merge in (("equal weights", equal), ("rotated counts four times", skewed)):
        times = ", ".join(f"{record.t:.2f}" for record in merge.report.merges)
        final = dict(zip(TASKS, merge.report.accuracy[-1], strict=True))
        print(f"{name}: operating times {times}; " + ", ".join(f"{task} {100 * a:.1f}" for task, a in final.items()))


if __name__ == "__main__":
    main()

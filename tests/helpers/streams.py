"""A stream of three tasks that several processes, or callbacks in the place of them, take further."""

import lightning as L
from toy import Classifier, Task, fit

from lightning_odem import ContinualMergeCallback


def tasks(count=3, **options):
    return [Task(number, shuffle=True, **options) for number in range(count)]


def process(directory, count=3, seed=3, stop_after=None, strategy="auto", **options):
    """What one process does of a stream; returns its module and callback."""
    L.seed_everything(seed, verbose=False)
    module = Classifier(dropout=0.2, batch_norm=True)
    merge = ContinualMergeCallback(dirpath=directory, calibration_size=12, **options)
    for done, task in enumerate(merge.remaining(tasks(count))):
        if done == stop_after:
            break
        fit(module, task, merge, strategy=strategy)
    return module, merge

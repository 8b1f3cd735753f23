"""What made a fine-tuned model, as one hash."""

import hashlib
import inspect
import json
import re
from importlib.metadata import version
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ModelSummary, ProgressBar
from torch import nn

from lightning_odem.stream.store.fingerprint import hash_tensors
from lightning_odem.tasks import Task

_SAMPLED = 256
_LIBRARIES = ("abc", "builtins", "lightning", "torch", "typing")
# Callbacks that leave the training alone.
_IDLE = (ProgressBar, ModelSummary, Checkpoint, LearningRateMonitor)
_TRAINER = (
    "max_epochs",
    "max_steps",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "limit_train_batches",
    "limit_test_batches",
    "world_size",
    "overfit_batches",
    "fast_dev_run",
)


def fingerprint(description: Any) -> str:
    """SHA-256 of plain data, 20 hexadecimal digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=repr).encode()).hexdigest()[:20]


def describe_training(module: L.LightningModule, task: Task, trainer: L.Trainer, seed: int) -> dict[str, Any]:
    """Everything that makes a fine-tuned model what it is, as plain data.

    The module by its class, source (of its bases too), plain attributes, architecture and weights; the task by
    :func:`describe_task`; the Trainer's settings and callbacks; the seed; and the versions of torch and lightning. Not
    that of this package, so that an update does not train everything anew. What it cannot see: source code outside
    these classes, and randomness that the seed does not govern.
    """
    callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, _IDLE)]  # type: ignore[attr-defined]
    return {
        "module": {
            "class": f"{type(module).__module__}.{type(module).__qualname__}",
            "source": _sources(type(module)),
            "settings": _plain_attributes(module) | {key: _stable(value) for key, value in module.hparams.items()},
            "architecture": _stable(module),
            "weights": hash_tensors(module.state_dict()),
        },
        "task": describe_task(task),
        "trainer": {name: _stable(getattr(trainer, name, None)) for name in _TRAINER}
        | {
            "accelerator": trainer.strategy.root_device.type,
            "callbacks": sorted(callback.state_key for callback in callbacks),
        },
        "seed": seed,
        "versions": {name: version(name) for name in ("torch", "lightning")},
    }


def describe_task(task: Task) -> dict[str, Any]:
    """A task's settings and a hash of its training data.

    The hash covers all labels and up to 256 images, evenly spaced: every image of a large dataset would take minutes.
    """
    train = task.calibration_dataset()
    digest = hashlib.sha256(np.asarray(train.targets).tobytes())
    for index in np.linspace(0, len(train) - 1, min(len(train), _SAMPLED)).astype(int):
        digest.update(np.ascontiguousarray(np.asarray(train[int(index)][0])).tobytes())
    return {
        "name": task.task_name,
        "classes": task.num_classes,
        "samples": len(train),
        "data": digest.hexdigest(),
        "batch_size": task.batch_size,
        "seed": task.seed,
        "train_transform": _stable(task.train_transform),
        # Scores are kept with a model.
        **({"metric": _sources(type(task))} if hasattr(task, "task_metric") else {}),
    }


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str, tuple))
    }


def _stable(value: Any) -> Any:
    """A representation without addresses, which differ from process to process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _sources(kind: type) -> list[str]:
    """Source code of a class and of those it is derived from, but for the libraries of every module."""
    return [_source(base) for base in kind.__mro__ if base.__module__.split(".")[0] not in _LIBRARIES]


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""

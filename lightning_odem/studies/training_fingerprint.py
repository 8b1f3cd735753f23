"""What made a fine-tuned model, as plain data and as one hash."""

import hashlib
import inspect
import json
import re
from functools import cache
from importlib.metadata import version
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ModelSummary, ProgressBar
from torch import nn

from lightning_odem.stream.store.fingerprint import hash_tensors
from lightning_odem.tasks import Task

_SAMPLED = 256
# Their versions are in the description, or Python's own.
_LIBRARIES = ("abc", "builtins", "lightning", "torch", "typing")
# Callbacks that do not change the training.
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
    """Give the first 20 hexadecimal digits of the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=repr).encode()).hexdigest()[:20]


def describe_training(module: L.LightningModule, task: Task, trainer: L.Trainer, seed: int) -> dict[str, Any]:
    """Describe what decides a fine-tuned model as plain data.

    The module is described by its class, plain attributes, architecture and weights, and by the source code of its
    class, its submodules' classes and their base classes. The task is described by :func:`describe_task`. The Trainer's
    settings and callbacks, the seed, and the versions of torch and lightning are included. The version of this package
    is not, so that an update does not train everything anew. Source code outside the classes named, and randomness
    that the seed does not govern, are not seen.
    """
    callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, _IDLE)]  # type: ignore[attr-defined]
    return {
        "module": {
            "class": f"{type(module).__module__}.{type(module).__qualname__}",
            "source": _sources(module),
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
    """Describe a task by its settings and a hash of its training data.

    The hash covers all labels and up to 256 evenly spaced images. Every image of a large dataset would take minutes.
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
        **({"train_transform_source": found} if (found := _sources(task.train_transform)) else {}),
        # Scores are kept with a model.
        **({"metric": _sources(task)} if hasattr(task, "task_metric") else {}),
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


def _sources(value: Any) -> list[str]:
    """Source code of a function, or of an object's class, its submodules' classes and all their base classes."""
    if inspect.isfunction(value):
        return [_source(value)]
    parts = value.modules() if isinstance(value, nn.Module) else [value]
    kinds = dict.fromkeys(kind for part in parts for kind in type(part).__mro__)
    return [_source(kind) for kind in kinds if kind.__module__.split(".")[0] not in _LIBRARIES]


@cache  # large files take long to search
def _source(definition: Any) -> str:
    try:
        return inspect.getsource(definition)
    except (OSError, TypeError):
        return ""

"""A stream of tiny image tasks and a classifier for them."""

from functools import partial

import numpy as np
import torch
from torch import nn

from lightning_odem import ContinualTrainer, TaskClassifier, TaskStream
from lightning_odem.tasks import ArrayDataset, Splits, Task


def make_backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 6))


def make_model(lr=0.05, **options):
    return TaskClassifier(make_backbone(), mean=[0.5] * 3, std=[0.25] * 3, lr=lr, **options)


def make_task(number, name, weight=1.0, **options):
    generator = np.random.default_rng(number)
    centres = generator.integers(60, 196, (3, 4, 4, 3))

    def samples(count):
        labels = np.arange(count) % 3
        noise = generator.normal(0, 40, (count, 4, 4, 3))
        return ArrayDataset((centres[labels] + noise).clip(0, 255).astype(np.uint8), labels)

    splits = Splits(samples(36), samples(15), samples(30))
    return Task(name, num_classes=3, splits=lambda: splits, weight=weight, **options)


def make_stream(number=3, **options):
    builders = {name: partial(make_task, index, name) for index, name in enumerate("abcdef"[:number])}
    return TaskStream(builders, **{"batch_size": 12} | options)


def make_trainer(*callbacks, **options):
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    return ContinualTrainer(callbacks=list(callbacks), **quiet | options)

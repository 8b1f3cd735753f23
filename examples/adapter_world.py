"""The models that adapter_merges.py merges, fine-tuned from one base model, and what it measures of merged ones."""

import math
import time
from collections.abc import Mapping
from statistics import mean
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from examples.text_classification import TextStream
from lightning_odem import Stream, TaskClassifier
from lightning_odem.parameters import load_snapshot, take_snapshot
from lightning_odem.stream.attach import attached


def trainer(**options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**quiet, accelerator="cpu", precision="bf16-mixed", **options)


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


class World:
    """One model of each task. The tasks' heads are probes on the base model's features, which nothing changes.

    Args:
        model: The base model; with adapters of peft, these alone are trained and merged.
        tasks: The tasks.
        epochs: Epochs of each fine-tuning.
        rank: Rank of the adapters.

    Attributes:
        incoming: What was trained of each model by name, by task.
        tuned: Accuracies of the fine-tuned models.
    """

    def __init__(self, model: TaskClassifier, tasks: TextStream, epochs: int, rank: int) -> None:
        self.model, self.tasks = model, list(tasks)
        model.normalize = nn.Identity()  # type: ignore[assignment]  # token ids are no images
        self.adapted: list[Any] = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
        stream = Stream("average")
        stream.begin(model)
        self.base, self.shared = stream.state.base or {}, stream.division.shared(model)
        self.incoming: dict[str, dict[str, Tensor]] = {}
        updates, self.tuned = [], []
        for task in self.tasks:
            load_snapshot(model, self.base, self.shared)
            trainer(max_epochs=epochs).fit(model, datamodule=task)
            self.incoming[task.task_name] = take_snapshot(model, self.shared)
            updates.append(self.updates("default"))
            self.tuned.append(self.accuracy(task))
        self.mean = [torch.stack(each).mean(0) for each in zip(*updates, strict=True)]
        self.best = [best_of_rank(each, rank) for each in self.mean if self.adapted]

    def accuracy(self, task: L.LightningDataModule) -> float:
        """Accuracy of the model as it is on a task's test split, in percent."""
        return 100 * trainer().test(self.model, datamodule=task, verbose=False)[0]["test/acc"]

    def updates(self, adapter: str) -> list[Tensor]:
        """What an adapter adds to each weight; without adapters, by how much weights differ from the base model's."""
        if self.adapted:
            return [layer.get_delta_weight(adapter).detach() for layer in self.adapted]
        named = self.model.backbone.named_parameters(prefix="backbone")
        return [tensor.detach() - self.base[name] for name, tensor in named]

    def merge(self, method: str, first: int, samples: int) -> list[float]:
        """What a method makes of the tasks, one after the other from one of them on, as :meth:`measure` gives it."""
        load_snapshot(self.model, self.base, self.shared)
        stream, seconds, fresh = Stream(method, calibration_size=samples), 0.0, {}
        stream.begin(self.model)
        for task in (order := [*self.tasks[first:], *self.tasks[:first]]):
            with attached(self.model, trainer()):
                start = time.perf_counter()
                drawn = stream.draw(task.calibration_dataset()) if stream.needs_samples else None
                stream.merge(self.model, self.incoming[task.task_name], task.task_name, samples=drawn)
                seconds += time.perf_counter() - start
            if task is not order[-1]:
                fresh[task.task_name] = self.accuracy(task)
        return self.measure([self.base, stream.state.merged, stream.state.method], seconds, fresh=fresh)

    def measure(
        self, kept: Any, seconds: float, adapter: str = "default", fresh: Mapping[str, float] = {}
    ) -> list[float]:
        """Accuracies, ACC, BWT, distances to the mean and its best approximation, seconds, and MB of what is kept."""
        found = {task.task_name: self.accuracy(task) for task in self.tasks}
        bwt = mean(found[name] - before for name, before in fresh.items()) if fresh else math.nan
        goals, update = [goal for goal in (self.mean, self.best) if goal], self.updates(adapter)
        far = [norm([a - b for a, b in zip(update, goal, strict=True)]) / norm(self.mean) for goal in goals]
        size = sum(leaf.nbytes for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)) / 1e6
        return [*found.values(), mean(found.values()), bwt, *far, *[math.nan] * (2 - len(far)), seconds, size]

"""An ordered stream of tasks."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_odem.arguments import check_instance, check_names, check_seed
from lightning_odem.tasks.splits import LabelledDataset
from lightning_odem.tasks.task import Task


class TaskStream(LightningDataModule):
    """Tasks in the order in which they arrive.

    A stream of one task can be given to ``Trainer.fit`` in place of that task. A stream of several tasks is for
    ``fit_tasks`` or for iteration.

    Args:
        builders: Functions by name that build the available tasks, in the default order. A builder takes the keywords
            ``weight``, ``train_transform``, ``batch_size``, ``num_workers`` and ``seed`` and must be cheap: it checks
            that files exist but reads no images.
        tasks: Names of the tasks to take, in this order; all by default.
        order_seed: Shuffle the tasks taken with this seed; None keeps their order.
        weights: Utility weight per task; 1 for tasks not named.
        batch_size: Samples per batch.
        num_workers: Worker processes per dataloader; 0 reads in the main process.
        train_transform: Augmentation of single training images, uint8 [C, H, W] to uint8, such as
            ``torchvision.transforms.v2.RandomHorizontalFlip()``; None for none.
        seed: Seed of the training shuffles and of the splits that are cut by this package.

    Attributes:
        pretraining: A source task on which to pretrain a base model, if the stream has one.

    Raises:
        ValueError: If ``tasks`` or ``weights`` name an unknown task, or ``tasks`` is empty or names one twice.

    Example:
        >>> from lightning_odem.tasks import DigitsStream
        >>> stream = DigitsStream(tasks=["rotated", "inverted"], weights={"inverted": 2.0})
        >>> [(task.task_name, task.task_weight) for task in stream], stream["inverted"] is stream[1]
        ([('rotated', 1.0), ('inverted', 2.0)], True)
    """

    pretraining: Task | None = None

    def __init__(
        self,
        builders: Mapping[str, Callable[..., Task]],
        tasks: list[str] | None = None,
        order_seed: int | None = None,
        weights: dict[str, float] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        train_transform: nn.Module | Callable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        names = list(builders if tasks is None else check_names("tasks", tasks))
        weights = {} if weights is None else check_instance("weights", weights, Mapping, "weights by task name")
        for argument, given in {"tasks": names, "weights": weights}.items():
            if unknown := [name for name in given if name not in builders]:
                raise ValueError(f"Unknown name in {argument}: {_quoted(unknown)}. Valid names: {_quoted(builders)}.")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks must name at least one task and none twice, got {names}.")
        if order_seed is not None:
            order = np.random.default_rng(check_seed("order_seed", order_seed)).permutation(len(names))
            names = [names[i] for i in order]
        self._builders = builders
        self._options = {
            "train_transform": train_transform,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "seed": seed,
        }
        self._tasks = {name: self._build(name, weights.get(name, 1.0)) for name in names}

    @property
    def names(self) -> list[str]:
        """Names of the tasks in order."""
        return list(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def __getitem__(self, key: int | str) -> Task:
        if isinstance(key, int):
            return list(self._tasks.values())[key]
        if key not in self._tasks:
            raise KeyError(f"No task {key!r} in this stream of {_quoted(self.names)}.")
        return self._tasks[key]

    @property
    def task_name(self) -> str:
        """Name of the only task."""
        return self._only().task_name

    @property
    def task_weight(self) -> float:
        """Utility weight of the only task."""
        return self._only().task_weight

    @property
    def num_classes(self) -> int:
        """Number of classes of the only task."""
        return self._only().num_classes

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes of the only task, if they are known."""
        return self._only().class_names

    def prepare_data(self) -> None:
        """Download the data of the only task if requested."""
        self._only().prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the data of the only task."""
        self._only().setup(stage)

    def train_dataloader(self) -> DataLoader:
        """Training batches of the only task."""
        return self._only().train_dataloader()

    def val_dataloader(self) -> DataLoader:
        """Validation batches of the only task."""
        return self._only().val_dataloader()

    def test_dataloader(self) -> DataLoader:
        """Test batches of the only task."""
        return self._only().test_dataloader()

    def calibration_dataset(self) -> LabelledDataset:
        """Training samples of the only task without augmentation."""
        return self._only().calibration_dataset()

    def _build(self, name: str, weight: float = 1.0) -> Task:
        return self._builders[name](weight=weight, **self._options)

    def _only(self) -> Task:
        if len(self) != 1:
            raise ValueError(
                f"One fit trains one task, but this stream has {len(self)}: {_quoted(self.names)}. "
                f'Run it with fit_tasks, or select one task, such as tasks=["{self.names[0]}"].'
            )
        return self[0]


def _quoted(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(repr(name) for name in names)

"""One task of a stream."""

import re
from collections.abc import Callable, Sequence, Sized
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, RandomSampler

from lightning_odem.arguments import check_instance, check_integer, check_range, check_seed, shown
from lightning_odem.tasks.selection import Selection
from lightning_odem.tasks.splits import LabelledDataset, Splits


class Task(LightningDataModule):
    """One task: the data of one fit, and what one merge adds.

    Batches are ``(images, labels)``: uint8 [B, C, H, W] and int64 [B]. Nothing is read before :meth:`setup` or the
    first dataloader, and only once.

    Args:
        name: Name of the task, unique in its stream.
        num_classes: Number of classes; labels are ``0 .. num_classes - 1``.
        splits: Called once, without arguments, to read the data.
        weight: Utility weight w_k of the task; not negative. 0 leaves the merged model as it is.
        source: Where the data comes from (a file, a folder, a package), for error messages.
        train_transform: Augmentation of single training images, uint8 [C, H, W] to uint8. Validation, test and
            :meth:`calibration_dataset` never see it. It draws from torch's global random state, which ``seed`` seeds in
            worker processes.
        batch_size: Samples per batch in all dataloaders.
        num_workers: Worker processes per dataloader; 0 reads in the main process.
        seed: Seed of the training shuffle. The shuffle does not depend on the global random state.
        prepare: Called in ``prepare_data`` before the data is first read, so in one process only; for downloads.
        class_names: Names of the classes in the order of their labels; by default those in the data.

    Raises:
        ValueError: If the weight is negative or not finite, or there are no classes. On reading: if a split is empty,
            or a label is missing or out of range.

    Example:
        >>> import numpy as np
        >>> from lightning_odem.tasks import ArrayDataset, Splits, Task
        >>> data = ArrayDataset(np.zeros((4, 8, 8), dtype=np.uint8), [0, 1, 0, 1])
        >>> task = Task("blank", num_classes=2, splits=lambda: Splits(data, data, data), batch_size=4)
        >>> images, labels = next(iter(task.train_dataloader()))
        >>> images.shape, images.dtype, task.task_name
        (torch.Size([4, 1, 8, 8]), torch.uint8, 'blank')
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        splits: Callable[[], Splits],
        weight: float = 1.0,
        source: str = "memory",
        train_transform: Callable | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        prepare: Callable[[], object] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.task_name = check_instance("name", name, str, "a string")
        try:
            self.task_weight = float(check_range("weight", weight, 0))
            self.num_classes = check_integer("num_classes", num_classes, 1)
            self.batch_size = check_integer("batch_size", batch_size, 1)
            self.num_workers = check_integer("num_workers", num_workers, 0)
            self.seed = check_seed("seed", seed)
            if train_transform is not None and not callable(train_transform):
                raise ValueError(f"train_transform must be a function of one image, got {shown(train_transform)}.")
        except ValueError as error:
            raise ValueError(f"Task {name!r} from {source}: {error}") from error
        self.source = source
        self.train_transform = train_transform
        self._read = splits
        self._prepare = prepare
        self._class_names = class_names

    @cached_property
    def splits(self) -> Splits:
        """The checked training, validation and test samples, read on first use."""
        splits = self._read()
        for split, dataset in zip(Splits._fields, splits, strict=True):
            self._check(split, dataset)
        return splits

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their labels, None if they have none; reads the data if necessary.

        Names from the attribute ``classes`` of torchvision's datasets are spelt out: ``polar_bear`` as ``polar bear``.
        """
        if self._class_names is not None:
            return list(self._class_names)
        data: Any = self.splits.train
        while not hasattr(data, "classes") and hasattr(data, "dataset"):
            data = data.dataset
        names = getattr(data, "classes", None)
        return names and [re.sub(r"(?<=[a-z])[_/](?=[a-z])", " ", name) for name in names]

    def prepare_data(self) -> None:
        """Download the data if requested."""
        if self._prepare is not None and "splits" not in self.__dict__:
            self._prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read and check the data: all splits at once for any stage, and only the first time."""
        _ = self.splits

    def calibration_dataset(self) -> LabelledDataset:
        """The training samples without augmentation, in their fixed order."""
        return self.splits.train

    def train_dataloader(self) -> DataLoader:
        """Augmented training batches, in an order that depends on the seed and the epoch."""
        train = self.splits.train
        sampler = EpochSampler(train, self.seed)
        if self.train_transform is not None:
            train = Selection(train, train.targets, transform=self.train_transform)
        return self._dataloader(train, sampler)

    def val_dataloader(self) -> DataLoader:
        """Validation batches in fixed order."""
        return self._dataloader(self.splits.val)

    def test_dataloader(self) -> DataLoader:
        """Test batches in fixed order."""
        return self._dataloader(self.splits.test)

    def _dataloader(self, dataset: LabelledDataset, sampler: "EpochSampler | None" = None) -> DataLoader:
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            # Without a generator of its own, even an unshuffled DataLoader draws a worker seed from the global one.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _check(self, split: str, dataset: LabelledDataset) -> None:
        where = f"Task {self.task_name!r}: the {split} split of {self.source}"
        if len(dataset) == 0:
            raise ValueError(f"{where} is empty.")
        targets = torch.as_tensor(dataset.targets)
        if len(targets) != len(dataset):
            raise ValueError(f"{where} has {len(dataset)} samples but {len(targets)} labels.")
        outside = ((targets < 0) | (targets >= self.num_classes)).nonzero()
        if len(outside):
            index = int(outside[0])
            raise ValueError(
                f"{where} has label {targets[index].item()} at index {index}; labels must be 0..{self.num_classes - 1}."
            )


class EpochSampler(RandomSampler):
    """A shuffle that depends only on the seed and the epoch.

    Lightning calls :meth:`set_epoch` before every epoch, so a run resumed between two epochs reads its samples in the
    order of the uninterrupted one. Without a Trainer the generator continues from epoch to epoch. Because this is a
    ``RandomSampler``, Lightning replaces it by a shuffling ``DistributedSampler`` if it needs one.

    Args:
        dataset: The training samples.
        seed: Seed of the generator; the global random state is neither read nor changed.

    Example:
        >>> sampler = EpochSampler(range(100), seed=0)
        >>> first, second = list(sampler), list(sampler)
        >>> sampler.set_epoch(0)
        >>> first == second, first == list(sampler)
        (False, True)
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        super().__init__(dataset, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Start the shuffle of an epoch (0-based)."""
        self.generator.manual_seed(self.seed + epoch)

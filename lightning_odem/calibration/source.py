"""Where a task's calibration samples come from."""

import random
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from lightning_odem.calibration import batches
from lightning_odem.calibration.containers import CannotBeKeptError
from lightning_odem.calibration.item_loading import OnItem, load_items
from lightning_odem.calibration.keeping import are_alike, as_rows, join, keep, keep_items
from lightning_odem.calibration.pool import trained_on
from lightning_odem.calibration.quota import balanced_order
from lightning_odem.calibration.rows import Rows

TRAINING = "the training dataset (training transforms apply; calibration_dataset() changes that)"


@dataclass(frozen=True)
class DrawnSamples:
    """Samples of a task, drawn for the buffer.

    Args:
        samples: A batch of CPU tensors in plain containers, or :class:`~lightning_odem.calibration.batches.Kept`.
        origin: Where they come from, for the log.
        transferred: Whether they went through the batch-transfer hooks already.
    """

    samples: Any
    origin: str
    transferred: bool = False


class Reservoir:
    """A uniform random choice of bounded size from batches whose number is not known (Vitter's algorithm R).

    Args:
        capacity: Samples kept.
        generator: Source of randomness, on the CPU.
        batch_size: The dataloader's batch size, if it is known.
    """

    def __init__(self, capacity: int, generator: torch.Generator, batch_size: int | None = None) -> None:
        self.capacity = capacity
        self.seen = 0
        self._generator = generator
        self._batch_size = batch_size
        self._kept: Any = None

    def update(self, batch: Any) -> None:
        """Consider the samples of a batch; those kept are copied to the CPU.

        A later batch that cannot be kept is passed over with a warning.

        Raises:
            CannotBeKeptError: If the first batch cannot be kept.
        """
        try:
            batch = keep(batch, self._batch_size, self._kept)
        except CannotBeKeptError as error:
            if self._kept is None:
                raise
            rank_zero_warn(f"A training batch gives no calibration samples, unlike those before it: {error}.")
            return
        places: dict[int, int] = {}
        for row in range(batches.count(batch)):
            slot = self.seen
            if self.seen >= self.capacity:
                slot = int(torch.randint(self.seen + 1, (), generator=self._generator))
            if slot < self.capacity:
                places[slot] = row  # a slot drawn twice keeps the later sample
            self.seen += 1
        if places:
            self._put(torch.tensor(list(places)), batches.select(batch, torch.tensor(list(places.values()))))

    def _put(self, slots: torch.Tensor, samples: Any) -> None:
        if self._kept is None:
            self._kept = samples.copy() if isinstance(samples, Rows) else samples
            return
        if isinstance(self._kept, Rows) or not are_alike(self._kept, samples):
            # Tensors of different shapes, or other containers than plain ones.
            samples, self._kept = as_rows(samples).copy(), as_rows(self._kept)
        replaced = slots < batches.count(self._kept)
        if isinstance(samples, Rows):
            self._kept = self._kept.put(slots[replaced], samples.select(replaced.nonzero().flatten()))
            self._kept = self._kept.append(samples.select((~replaced).nonzero().flatten()))
            return
        for leaf, new in zip(tree_leaves(self._kept), tree_leaves(samples), strict=True):
            leaf[slots[replaced]] = new[replaced]
        if not replaced.all():
            self._kept = batches.concatenate([self._kept, batches.select(samples, ~replaced)])

    @property
    def samples(self) -> Any:
        """The samples kept; None before the first batch."""
        return self._kept.padded() if isinstance(self._kept, Rows) else self._kept


def draw(
    trainer: L.Trainer,
    given: Any,
    count: int,
    generator: torch.Generator,
    balanced: bool = True,
    on_item: OnItem | None = None,
) -> DrawnSamples | None:
    """Draw up to ``count`` samples of the task that a Trainer fits; the global random state stays as it is.

    The source is the first of these: the data that the user gave, the datamodule's ``calibration_dataset()``, its
    ``calibration_dataloader()``, the training dataset. Samples of a dataset are drawn by index. Batches of a loader are
    taken in their order until there are enough.

    Args:
        trainer: The Trainer.
        given: Calibration data from the user, or None.
        count: The most samples.
        generator: Source of randomness, on the CPU.
        balanced: Whether the choice is class-balanced if the dataset has integer ``targets``.
        on_item: Called with the number of samples that are loaded and that of all, if they are drawn by index.

    Returns:
        The samples; None if the training data is an ``IterableDataset``, whose samples are collected during training.

    Raises:
        ValueError: If the source is empty or there are several training loaders.
        CannotBeKeptError: If the samples cannot be collated or kept.
    """
    loader = trainer.train_dataloader
    collate, batch_size = collation(trainer)
    with isolate_rng():
        _seed(generator.initial_seed() % 2**31)
        origin, source = _source(trainer, given)
        if source is None:
            return None
        is_dataset = hasattr(source, "__getitem__") and hasattr(source, "__len__")
        try:
            if not is_dataset:
                samples = _take(source, count)
            elif isinstance(loader, DataLoader) and loader.batch_sampler is None and source is loader.dataset:
                # Its items are batches.
                index = torch.randperm(len(loader.dataset), generator=generator).tolist()
                samples = _take((collate(source[item]) for item in index), count)
            else:
                own = loader if origin == TRAINING else None
                samples = draw_by_index(source, count, generator, collate, balanced, batch_size, own, on_item)
        except CannotBeKeptError as error:
            raise CannotBeKeptError(f"from {origin}, cannot be kept for later tasks: {error}") from error
    if samples is None:
        raise ValueError(f"No calibration sample can be drawn: {origin} is empty.")
    return DrawnSamples(samples, origin)


def draw_by_index(
    dataset: Any,
    count: int,
    generator: torch.Generator,
    collate: Any = default_collate,
    balanced: bool = True,
    batch_size: int | None = None,
    loader: DataLoader | None = None,
    on_item: OnItem | None = None,
) -> Any:
    """Up to ``count`` samples of a map-style dataset; None if it is empty.

    Args:
        dataset: The dataset.
        count: The most samples.
        generator: Source of randomness, on the CPU.
        collate: The function that makes batches of the samples.
        balanced: Whether the choice is class-balanced if the dataset has integer ``targets``. Without it no label is
            read.
        batch_size: The dataloader's batch size, if it is known.
        loader: The dataloader whose worker processes load the samples; by default this process does.
        on_item: Called with the number of samples that are loaded and that of all.

    Raises:
        CannotBeKeptError: If the samples cannot be collated or kept.
    """
    if len(dataset) == 0:
        return None
    index = balanced_order(targets_of(dataset) if balanced else None, len(dataset), generator)[:count]
    items = load_items(Subset(dataset, [int(item) for item in index]), loader, on_item)
    return keep_items(items, collate, batch_size)


def collation(trainer: L.Trainer) -> tuple[Any, int | None]:
    """The training dataloader's collate function, and its batch size if it is known."""
    loader = trainer.train_dataloader
    return (loader.collate_fn, loader.batch_size) if isinstance(loader, DataLoader) else (default_collate, None)


def targets_of(dataset: Any) -> torch.Tensor | None:
    """Integer class labels of a dataset, found without loading a sample; None if it does not tell them."""
    if isinstance(dataset, Subset):
        parent = targets_of(dataset.dataset)
        return None if parent is None else parent[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [part for part in map(targets_of, dataset.datasets) if part is not None]
        return torch.cat(parts) if len(parts) == len(dataset.datasets) else None
    found = dataset.tensors[-1] if isinstance(dataset, TensorDataset) else getattr(dataset, "targets", None)
    if found is None:
        return None
    try:
        labels = torch.as_tensor(np.asarray(found))
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels if labels.dim() == 1 and not labels.is_floating_point() and len(labels) == len(dataset) else None


def _source(trainer: L.Trainer, given: Any) -> tuple[str, Any]:
    """The name of the source for the log, and the source; None for an ``IterableDataset``."""
    if given is not None:
        return "calibration data given to the callback", given
    for name in ("calibration_dataset", "calibration_dataloader"):
        method = getattr(trainer.datamodule, name, None)  # type: ignore[attr-defined]
        if method is not None and (found := method()) is not None:
            return f"{name}()", found
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Calibration samples cannot be drawn from training data of type {type(loader).__name__}; give the "
            "datamodule a calibration_dataset() or calibration_dataloader()."
        )
    if isinstance(loader.dataset, IterableDataset):
        return "", None
    return TRAINING, loader.dataset if loader.batch_sampler is None else trained_on(trainer, loader)


def _take(loader: Any, count: int) -> Any:
    """At least ``count`` samples from the first batches, if there are as many; None if there is no batch."""
    taken: list[Any] = []
    size = 0
    for batch in loader:
        taken.append(keep(batch, getattr(loader, "batch_size", None), taken[0] if taken else None))
        size += batches.count(taken[-1])
        if size >= count:
            break
    return batches.select(join(taken), slice(None)) if taken else None


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (user transforms may use the global generator)

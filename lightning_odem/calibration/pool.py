"""Which samples of the training dataset a task is trained on."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import chain, islice
from typing import Any

import lightning as L
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def trained_on(trainer: L.Trainer, loader: DataLoader) -> Any:
    """The samples that the training can see: the dataset, or a subset of it.

    A sampler that leaves samples out, such as one of a split, leaves them out here too. If batches come in order,
    ``limit_train_batches`` and ``overfit_batches`` leave out what is behind the last batch. Nothing is loaded, and the
    sampler and random numbers stay as they are.

    Args:
        trainer: The Trainer.
        loader: Its training dataloader, of a dataset that is read by index.

    Example:
        >>> loader = DataLoader(range(10), sampler=[7, 1, 7])
        >>> list(trained_on(L.Trainer(logger=False), loader))
        [1, 7]
    """
    batches, dataset = loader.batch_sampler, loader.dataset
    sampler = batches.sampler if type(batches) is BatchSampler else loader.sampler
    size: int = len(dataset)  # type: ignore[arg-type]
    if batches is not None and type(batches) is not BatchSampler:
        index = _seen(chain.from_iterable(_copied(batches)), size)
    elif isinstance(sampler, (RandomSampler, DistributedSampler)):
        return dataset
    elif isinstance(sampler, SequentialSampler):
        index = set(range(int(min(trainer.num_training_batches * getattr(batches, "batch_size", 1), size))))
    elif isinstance(sampler, SubsetRandomSampler):
        index = set(map(int, sampler.indices))
    elif isinstance(sampler, WeightedRandomSampler):
        index = set(sampler.weights.nonzero().flatten().tolist())
    else:
        index = _seen(_copied(sampler), size)
    return dataset if len(index) in (0, size) else Subset(dataset, sorted(index))


def _seen(sampler: Iterator[Any], size: int) -> set[int]:
    """The indices that a sampler of the user's gives; it may have no end."""
    return set(map(int, islice(sampler, 10 * size)))


def _copied(sampler: Any) -> Iterator[Any]:
    """Go through a copy of a sampler; one that cannot be copied gives nothing."""
    try:
        copy = deepcopy(sampler)
    except Exception:  # any type, since it is the user's
        return
    yield from copy

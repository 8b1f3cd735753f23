"""Items of a dataset, loaded one by one or by the worker processes of a dataloader."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from torch.utils.data import DataLoader

OnItem = Callable[[int, int], None]
_EVERY = 32  # items between two calls, since showing progress takes time


def load_items(dataset: Any, loader: DataLoader | None = None, on_item: OnItem | None = None) -> list[Any]:
    """Load all items of a dataset in order.

    Worker processes are seeded from the global random state.

    Args:
        dataset: The dataset.
        loader: The dataloader whose number and kind of worker processes are used; without workers, this process loads.
        on_item: Called with (items loaded, all items) now and then.

    Example:
        >>> load_items(["a", "b"])
        ['a', 'b']
    """
    total = len(dataset)
    source = _by_workers(dataset, loader) if loader is not None and loader.num_workers else _by_hand(dataset)
    items = []
    for number, item in enumerate(source):
        if on_item is not None and number % _EVERY == 0:
            on_item(number, total)
        items.append(item)
    return items


def _by_hand(dataset: Any) -> Iterator[Any]:
    return (dataset[number] for number in range(len(dataset)))


def _by_workers(dataset: Any, loader: DataLoader) -> Iterator[Any]:
    workers = DataLoader(
        dataset,
        batch_size=min(loader.batch_size or 1, max(len(dataset) // loader.num_workers, 1)),
        collate_fn=list,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=loader.timeout,
        prefetch_factor=loader.prefetch_factor,
    )
    for items in workers:
        yield from map(deepcopy, items)  # not in shared memory, which takes an open file for each tensor

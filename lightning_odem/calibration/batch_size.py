"""The number of samples in a batch, read off from its tensors or its lists."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_odem.calibration import batches
from lightning_odem.calibration.containers import Container


def plain_size(batch: Any) -> int | None:
    """Number of samples in a batch of tensors in plain containers; None for any other batch."""
    try:
        return batches.count(batch)
    except (TypeError, ValueError):
        return None


def candidate_sizes(batch: Any, batch_size: int | None) -> list[tuple[int, bool]]:
    """Numbers of samples that a batch may have, the likeliest first, each with whether lists of records count them.

    The lengths of lists of mappings come first, then the dataloader's batch size, then the sizes of tensors and the
    lengths of other lists, the most frequent first.

    Args:
        batch: The batch, taken apart.
        batch_size: The dataloader's batch size, if it is known.

    Example:
        >>> from lightning_odem.calibration.containers import take_apart
        >>> candidate_sizes(take_apart(([1, 2, 3], [{"a": 1}, {"a": 2}])), None)
        [(2, True), (3, False)]
    """
    tensors, lists, records = Counter[int](), Counter[int](), Counter[int]()

    def see(part: Any) -> None:
        if isinstance(part, Tensor) and part.dim():
            tensors[len(part)] += 1
        if isinstance(part, Container):
            if part.kind in ("list", "tuple") and part.items:
                lists[len(part.items)] += 1
                if all(isinstance(item, Container) and item.keys for item in part.items):
                    records[len(part.items)] += 1
            for item in part.items:
                see(item)

    see(batch)
    known = [batch_size] if batch_size and (tensors[batch_size] or lists[batch_size]) else []
    by_lists = [size for size, _ in records.most_common()]
    likely = [*by_lists, *known, *(size for size, _ in tensors.most_common() + lists.most_common())]
    return [(size, size in records) for size in dict.fromkeys(likely) if size]


def is_counted_by_lists(batch: Any, batch_size: int | None, tensor_size: int) -> bool:
    """Whether lists count the samples, although all tensors of the batch agree on a number.

    They do if a list holds mappings only, or if the dataloader's batch size is another number and the length of a list.

    Args:
        batch: The batch.
        batch_size: The dataloader's batch size, if it is known.
        tensor_size: The number that the tensors agree on.
    """
    lists = list(_lists(batch))
    if any(part and all(isinstance(item, Mapping) for item in part) for part in lists):
        return True
    return batch_size not in (None, tensor_size) and any(len(part) == batch_size for part in lists[1:])


def _lists(batch: Any) -> Iterator[Any]:
    """A batch's plain lists and tuples; the first is the batch itself, or an empty one if it is a mapping."""
    if isinstance(batch, (list, tuple)):
        yield batch
    elif isinstance(batch, Mapping):
        yield []
    children = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    for child in children:
        yield from (part for part in _lists(child) if part)

"""How the samples of any dataset or dataloader are kept: as plain tensors, in columns, or as items of the dataset."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import default_collate

from lightning_odem.calibration import batches
from lightning_odem.calibration.batches import Kept
from lightning_odem.calibration.containers import (
    CannotBeKeptError,
    Container,
    fresh,
    from_plain,
    put_together,
    take_apart,
    to_plain,
)
from lightning_odem.calibration.rows import Cutter, Rows, label_of

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Items(Kept):
    """Items of a dataset, which a dataloader's function collates whenever they are used.

    Random numbers that it draws are the same every time.

    Args:
        items: The items, taken apart.
        limit: How many of them the dataloader puts in a batch.
        collate: The function; it is not stored.
    """

    items: tuple[Any, ...]
    limit: int
    collate: Collate | None = None

    def __len__(self) -> int:
        return len(self.items)

    def select(self, index: Tensor | slice) -> "Items":
        """The items at ``index``."""
        if isinstance(index, slice):
            return self.view(index)
        return replace(self, items=tuple(self.items[row] for row in index.tolist()))

    def view(self, index: slice) -> "Items":
        """The items of a range."""
        return replace(self, items=self.items[index])

    def labels(self) -> Tensor | None:
        """Class labels, by the rule for batches of tensors."""
        found = [label_of(item) for item in self.items]
        found = [label.item() if isinstance(label, Tensor) and label.dim() == 0 else label for label in found]
        return torch.tensor(found) if found and all(type(label) is int for label in found) else None

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Batches as the dataloader would make them, each with the indices of its samples.

        Raises:
            ValueError: If the function is unknown.
        """
        if self.collate is None:
            raise ValueError(
                "Calibration samples of an earlier process are collated by the training dataloader's collate_fn, "
                "which is not known here."
            )
        for index in torch.arange(len(self)).split(self.limit):
            with isolate_rng():
                torch.manual_seed(len(self))
                batch = self.collate([put_together(self.items[row]) for row in index.tolist()])
            yield batch, index

    def collated_by(self, collate: Collate | None) -> "Items":
        """The same with a function, where it is not known."""
        return self if self.collate is not None else replace(self, collate=collate)

    def state(self) -> dict[str, Any]:
        """As a file can hold it."""
        return {"items": [to_plain(item) for item in self.items], "limit": self.limit}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Items":
        """The reverse of :meth:`state`."""
        return cls(tuple(map(from_plain, state["items"])), state["limit"])


def from_state(state: dict[str, Any]) -> Kept:
    """What gave its :meth:`~lightning_odem.calibration.batches.Kept.state`."""
    return Items.from_state(state) if "items" in state else Rows.from_state(state)


def keep(batch: Any, batch_size: int | None = None, like: Any = None) -> Any:
    """The samples of a batch from a dataloader: the batch itself if it is tensors in plain containers.

    Args:
        batch: The batch.
        batch_size: The dataloader's, where it is known.
        like: Samples of another batch of this dataloader.

    Raises:
        CannotBeKeptError: If the batch holds something else than can be kept, or cannot be cut into samples.
    """
    plain = _plain_size(batch)
    if plain is not None and not isinstance(like, Rows) and not _counts_lists(batch, batch_size, plain):
        return batch
    apart = take_apart(batch)
    error: CannotBeKeptError | None = None
    for size, lists in _sizes(apart, batch_size):
        # A batch that is a list of two is rather inputs and targets than two samples.
        whole = lists or size == batch_size or (isinstance(like, Rows) and like.is_list)
        try:
            rows = Cutter(size, lists, whole).cut(apart)
        except CannotBeKeptError as found:
            error = error or found
            continue
        if not isinstance(like, Rows) or rows.fits(like):
            return rows if isinstance(like, Rows) else _tried(rows)
        error = error or CannotBeKeptError("their batches differ in structure")
    raise error or CannotBeKeptError("nothing in their batch counts the samples")


def keep_items(items: Sequence[Any], collate: Collate, batch_size: int | None = None) -> Any:
    """Samples from items of a dataset: in one batch, as ``collate`` makes it, if it is tensors of their own shape.

    Args:
        items: The items; ``collate`` gets copies of their containers.
        collate: The dataloader's function.
        batch_size: The dataloader's, where it is known.

    Raises:
        CannotBeKeptError: If they cannot be collated, or not kept.
    """
    size = len(items)
    whole, reason = _attempt(collate, items)
    is_plain = reason is None and _plain_size(whole) == size
    if is_plain and collate is default_collate:  # it stacks what has one shape, or fails
        return batches.select(whole, slice(None))
    collated = [_attempt(collate, [item]) for item in items]
    if failed := next((error for _, error in collated if error is not None), None):
        if is_plain:
            return batches.select(whole, slice(None))
        raise CannotBeKeptError(f"they cannot be collated ({type(failed).__name__}: {failed})") from failed
    if is_plain and all(_shapes(one) == _shapes(whole) for one, _ in collated):
        return batches.select(whole, slice(None))
    ones = [take_apart(one) for one, _ in collated]
    try:
        if reason is None and size > 1:
            return _tried(Cutter(size).align(take_apart(whole), take_apart(_attempt(collate, items)[0]), ones))
        if size == 1 or collate is default_collate:
            return _tried(_joined([Cutter(1, lists=True).cut(one) for one in ones]))
        error = CannotBeKeptError(f"several of them cannot be collated ({type(reason).__name__}: {reason})")
    except CannotBeKeptError as found:
        error = found
    try:
        return Items(tuple(map(take_apart, items)), 1 if reason is not None else batch_size or size, collate)
    except CannotBeKeptError as own:
        if reason is None:
            raise CannotBeKeptError(f"{error}; and as items of the dataset {own}") from own
    return replace(_joined([Cutter(1, lists=True).cut(one) for one in ones]), limit=1)


def are_alike(one: Any, other: Any) -> bool:
    """Whether samples are plain tensors of the same structure and shapes."""
    return not isinstance(one, Kept) and not isinstance(other, Kept) and _shapes(one) == _shapes(other)


def as_rows(samples: Any) -> Rows:
    """Samples in columns."""
    return samples if isinstance(samples, Rows) else Cutter(batches.count(samples)).cut(take_apart(samples))


def join(parts: Sequence[Any]) -> Any:
    """The samples of several batches, each of which was kept, padded where batches were.

    Raises:
        CannotBeKeptError: If the batches differ in structure.
    """
    if not any(isinstance(part, Kept) for part in parts):
        try:
            return batches.concatenate(parts)
        except ValueError:
            pass
    return _joined([as_rows(part) for part in parts]).padded()


def _joined(parts: Sequence[Rows]) -> Rows:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.append(part)
    return whole


def _tried(rows: Rows) -> Rows:
    """The samples, of the first of which a batch was made.

    Raises:
        CannotBeKeptError: If its containers cannot be made again.
    """
    next(rows.view(slice(1)).batches())
    return rows


def _counts_lists(batch: Any, batch_size: int | None, plain: int) -> bool:
    """Whether lists count the samples of a batch whose tensors agree on another number, or on the same by chance."""
    lists = list(_lists(batch))
    found = {len(part) for part in lists if part and all(isinstance(item, Mapping) for item in part)}
    return bool(found) or (batch_size not in (None, plain) and any(len(part) == batch_size for part in lists[1:]))


def _lists(batch: Any) -> Iterator[Any]:
    """A batch's plain lists and tuples, its own first."""
    if isinstance(batch, (list, tuple)):
        yield batch
    elif isinstance(batch, Mapping):
        yield []
    children = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    for child in children:
        yield from (part for part in _lists(child) if part)


def _sizes(batch: Any, batch_size: int | None) -> list[tuple[int, bool]]:
    """Numbers of samples that a batch may have, and whether lists in it count them; the likeliest first."""
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


def _attempt(collate: Collate, items: Sequence[Any]) -> tuple[Any, Exception | None]:
    try:
        return collate([fresh(item) for item in items]), None
    except Exception as error:  # whatever the user's function raises
        return None, error


def _plain_size(batch: Any) -> int | None:
    try:
        return batches.count(batch)
    except (TypeError, ValueError):
        return None


def _shapes(batch: Any) -> Any:
    """Structure of a batch of tensors, and the shapes of its samples."""
    leaves, structure = tree_flatten(batch)
    return structure, [leaf.shape[1:] if isinstance(leaf, Tensor) else None for leaf in leaves]

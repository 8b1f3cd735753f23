"""How samples of any dataset or dataloader are kept: as plain tensors, in columns, or as items of the dataset."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import default_collate

from lightning_odem.calibration import batches
from lightning_odem.calibration.batch_size import candidate_sizes, is_counted_by_lists, plain_size
from lightning_odem.calibration.batches import Kept
from lightning_odem.calibration.containers import CannotBeKeptError, fresh, take_apart
from lightning_odem.calibration.decollation import Decollation
from lightning_odem.calibration.items import Collate, Items
from lightning_odem.calibration.rows import Rows


def from_state(state: dict[str, Any]) -> Kept:
    """The samples that gave this :meth:`~lightning_odem.calibration.batches.Kept.state`."""
    return Items.from_state(state) if "items" in state else Rows.from_state(state)


def keep(batch: Any, batch_size: int | None = None, like: Any = None) -> Any:
    """The samples of a dataloader's batch; the batch itself if it is tensors in plain containers.

    Args:
        batch: The batch.
        batch_size: The dataloader's batch size, if it is known.
        like: Samples kept of an earlier batch of this dataloader. If they are :class:`Rows`, the batch must have the
            same structure.

    Raises:
        CannotBeKeptError: If the batch holds something that cannot be kept, or cannot be cut into samples.
    """
    plain = plain_size(batch)
    if plain is not None and not isinstance(like, Rows) and not is_counted_by_lists(batch, batch_size, plain):
        return batch
    apart = take_apart(batch)
    error: CannotBeKeptError | None = None
    for size, lists in candidate_sizes(apart, batch_size):
        # A list of two is more likely inputs and targets than two samples.
        whole = lists or size == batch_size or (isinstance(like, Rows) and like.is_list)
        try:
            rows = Decollation(size, lists, whole).cut(apart)
        except CannotBeKeptError as found:
            error = error or found
            continue
        if not isinstance(like, Rows) or rows.fits(like):
            return rows if isinstance(like, Rows) else _tried(rows)
        error = error or CannotBeKeptError("their batches differ in structure")
    raise error or CannotBeKeptError("nothing in their batch counts the samples")


def keep_items(items: Sequence[Any], collate: Collate, batch_size: int | None = None) -> Any:
    """The samples of a dataset's items.

    The result is a batch of plain tensors if ``collate`` stacks the items, and :class:`Rows` if it also pads them. Any
    other function is called anew for each batch: the result is :class:`Items`. A function that takes only one item at a
    time gives :class:`Rows` in batches of one if the items themselves cannot be kept.

    Args:
        items: The items; ``collate`` gets copies of their containers.
        collate: The dataloader's function.
        batch_size: The dataloader's batch size, if it is known.

    Raises:
        CannotBeKeptError: If the items cannot be collated, or the result cannot be kept.
    """
    size = len(items)
    whole, reason = _attempt(collate, items)
    is_plain = reason is None and plain_size(whole) == size
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
            return _tried(Decollation(size).align(take_apart(whole), take_apart(_attempt(collate, items)[0]), ones))
        if size == 1 or collate is default_collate:
            return _tried(_joined([Decollation(1, lists=True).cut(one) for one in ones]))
        error = CannotBeKeptError(f"several of them cannot be collated ({type(reason).__name__}: {reason})")
    except CannotBeKeptError as found:
        error = found
    try:
        return Items(tuple(map(take_apart, items)), 1 if reason is not None else batch_size or size, collate)
    except CannotBeKeptError as own:
        if reason is None:
            raise CannotBeKeptError(f"{error}; and as items of the dataset {own}") from own
    return replace(_joined([Decollation(1, lists=True).cut(one) for one in ones]), limit=1)


def are_alike(one: Any, other: Any) -> bool:
    """Whether samples are plain tensors of the same structure and shapes."""
    return not isinstance(one, Kept) and not isinstance(other, Kept) and _shapes(one) == _shapes(other)


def as_rows(samples: Any) -> Rows:
    """The samples in columns; a plain batch is cut."""
    return samples if isinstance(samples, Rows) else Decollation(batches.count(samples)).cut(take_apart(samples))


def join(parts: Sequence[Any]) -> Any:
    """The samples of several batches, each from :func:`keep`; padding of the batches is found.

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
    """The samples, after a batch of the first one was made on trial.

    Raises:
        CannotBeKeptError: If the batch's containers cannot be made again.
    """
    next(rows.view(slice(1)).batches())
    return rows


def _attempt(collate: Collate, items: Sequence[Any]) -> tuple[Any, Exception | None]:
    """What ``collate`` makes of the items, or the error it raises."""
    try:
        return collate([fresh(item) for item in items]), None
    except Exception as error:  # whatever the user's function raises
        return None, error


def _shapes(batch: Any) -> Any:
    """Structure of a batch of tensors, and the shapes of its samples."""
    leaves, structure = tree_flatten(batch)
    return structure, [leaf.shape[1:] if isinstance(leaf, Tensor) else None for leaf in leaves]

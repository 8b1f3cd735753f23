"""Decollation: a batch, taken apart, is cut into its samples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_odem.calibration import batches
from lightning_odem.calibration.column import Column
from lightning_odem.calibration.containers import CannotBeKeptError, Container, same
from lightning_odem.calibration.padding import Padding
from lightning_odem.calibration.rows import Rows, place


class Decollation:
    """Cuts one batch of ``size`` samples, the reverse of a collate function.

    Args:
        size: Number of samples.
        lists: Whether every list of that length within the batch holds one value per sample. By default a list whose
            items count the samples themselves is a container.
        whole: Whether the batch itself may be a list of samples.

    Example:
        >>> from lightning_odem.calibration.containers import take_apart
        >>> rows = Decollation(2).cut(take_apart({"x": torch.zeros(2, 3), "name": ["a", "b"], "t": 0.5}))
        >>> [column.kind for column in rows.columns]
        ['tensor', 'list', 'common']
    """

    def __init__(self, size: int, lists: bool = False, whole: bool = True) -> None:
        self._size, self._lists, self._whole = size, lists, whole
        self._columns: list[Column] = []
        # The values of each column as the samples have them by themselves, where these are known.
        self._alone: list[Any] = []

    def cut(self, batch: Any) -> Rows:
        """The samples of a batch, judged by the batch alone.

        Raises:
            CannotBeKeptError: If a tensor has another number of samples, or nothing counts them.
        """
        rows = Rows(self._cut(batch, 0), tuple(self._columns))
        if not any(column.kind != "common" for column in rows.columns):
            raise CannotBeKeptError("nothing in their batch counts the samples")
        return rows

    def align(self, whole: Any, again: Any, ones: Sequence[Any]) -> Rows:
        """The samples of a batch, judged by the batches of one that they make, too.

        Args:
            whole: The batch.
            again: The same items, collated once more; it differs from ``whole`` where the collate function is random.
            ones: The samples, each as a batch of one.

        Raises:
            CannotBeKeptError: If the batch is not made of its samples by padding and stacking.
        """
        tree = self._align(whole, again, ones)
        if any(column.kind == "tensor" and isinstance(column.values, list) for column in self._columns):
            # What belongs together, such as a masked text and its labels, is drawn together.
            self._columns = [
                replace(column, values=own) if column.kind != "tensor" or isinstance(column.values, Tensor) else column
                for column, own in zip(self._columns, self._alone, strict=True)
            ]
        return Rows(tree, tuple(self._columns))

    def _add(self, column: Column, alone: Any = None) -> Container:
        self._columns.append(column)
        self._alone.append(alone)
        return place(len(self._columns) - 1)

    def _cut(self, part: Any, depth: int) -> Container:
        if isinstance(part, Tensor) and part.dim():
            if len(part) != self._size:
                raise CannotBeKeptError(
                    f"the tensors of a batch disagree on the number of samples: {sorted({len(part), self._size})}"
                )
            return self._add(Column("tensor", part))
        if not isinstance(part, Container):
            return self._add(Column("common", [part] * self._size))
        is_list = part.kind in ("list", "tuple") and len(part.items) == self._size and (depth > 0 or self._whole)
        before = len(self._columns)
        if not (is_list and depth and self._lists):
            try:
                items = tuple(self._cut(item, depth + 1) for item in part.items)
                # A list without anything that counts samples is one value per sample.
                if not is_list or any(column.kind != "common" for column in self._columns[before:]):
                    return Container(part.kind, items, part.keys, part.type)
            except CannotBeKeptError:
                if not is_list:
                    raise
        del self._columns[before:], self._alone[before:]
        return self._add(Column(part.kind, list(part.items)))

    def _align(self, whole: Any, again: Any, ones: Sequence[Any]) -> Container:
        if isinstance(whole, Tensor) and all(isinstance(one, Tensor) for one in ones):
            return self._align_tensors(whole, not same(whole, again), ones)
        if not isinstance(whole, Container):
            return self._add_common(whole, ones, f"{whole!r:.60}")
        alike = [one for one in ones if isinstance(one, Container) and (one.kind, one.type) == (whole.kind, whole.type)]
        if len(alike) == len(ones) and whole.kind in ("list", "tuple") and all(len(one.items) == 1 for one in alike):
            values = [one.items[0] for one in alike]
            is_random = not same(whole, again)
            if len(whole.items) == self._size and (is_random or all(map(same, whole.items, values))):
                return self._add(Column(whole.kind, list(whole.items)), values)
        every = [whole, again, *alike]
        if len(alike) != len(ones) or len({(part.keys, len(part.items)) for part in every}) != 1:
            raise CannotBeKeptError("their batches differ in structure")
        parts = zip(whole.items, again.items, zip(*(one.items for one in alike), strict=True), strict=True)
        return Container(whole.kind, tuple(self._align(*part) for part in parts), whole.keys, whole.type)

    def _align_tensors(self, whole: Tensor, is_random: bool, ones: Sequence[Tensor]) -> Container:
        dim = self._batch_dimension(whole, ones)
        if dim is None:
            return self._add_common(whole, ones, "a tensor")
        whole, ones = whole.movedim(dim, 0), [one.movedim(dim, 0) for one in ones]
        if all(one.shape[1:] == whole.shape[1:] for one in ones):
            together = batches.concatenate(ones)
            if not is_random and not torch.equal(together, whole):
                raise _depends("a tensor")
            return self._add(Column("tensor", whole, dim), together)
        return self._add(Column("tensor", list(ones), dim, Padding.between(whole, ones, is_random)))

    def _batch_dimension(self, whole: Tensor, ones: Sequence[Tensor]) -> int | None:
        """The first dimension that is the number of samples in the batch and 1 in a batch of one; None without any."""
        for dim, size in enumerate(whole.shape):
            if size == self._size and all(one.dim() == whole.dim() and one.shape[dim] == 1 for one in ones):
                return dim
        return None

    def _add_common(self, whole: Any, ones: Sequence[Any], what: str) -> Container:
        """Add a value that belongs to the batch, if it is the same in batches of one."""
        if not all(same(whole, one) for one in ones):
            raise _depends(what)
        return self._add(Column("common", [whole] * self._size), [whole] * self._size)


def _depends(what: str) -> CannotBeKeptError:
    return CannotBeKeptError(f"{what} in their batch depends on what is in the batch")

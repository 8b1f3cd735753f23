"""Samples as the rows of a table, from batches in whatever containers and shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_odem.calibration import batches
from lightning_odem.calibration.batches import Kept
from lightning_odem.calibration.column import Column
from lightning_odem.calibration.containers import (
    CannotBeKeptError,
    Container,
    from_plain,
    put_together,
    same,
    to_plain,
)
from lightning_odem.calibration.padding import find_padding, trim


@dataclass(frozen=True)
class Rows(Kept):
    """Samples of batches that are more than equally large tensors in plain containers.

    Args:
        tree: The batch's containers; in place of each entry stands the number of its column, see :func:`place`.
        columns: The entries.
        limit: The most samples in one batch; 0 for any number.
    """

    tree: Any
    columns: tuple[Column, ...]
    limit: int = 0

    def __len__(self) -> int:
        return len(self.columns[0].values)

    def __getitem__(self, key: Any) -> Any:
        """One entry of the batch of all samples: a tensor [n, ...], or a list of n values."""
        keys = self.tree.keys or range(len(self.tree.items))
        found = self.tree.items[list(keys).index(key)]
        if not _is_place(found):
            raise KeyError(key)
        values = self.columns[found.items[0]].values
        return values if isinstance(values, Tensor) else [put_together(value) for value in values]

    def select(self, index: Tensor | slice) -> "Rows":
        """The samples at ``index``; tensors of all samples are copied."""
        return replace(self, columns=tuple(column.select(index) for column in self.columns))

    def view(self, index: slice) -> "Rows":
        """The samples of a range, sharing memory with these."""
        return replace(self, columns=tuple(column.view(index) for column in self.columns))

    def labels(self) -> Tensor | None:
        """Class labels, as :func:`~lightning_odem.calibration.batches.labels` finds them; a list of integers counts."""
        found = label_of(self.tree)
        values = self.columns[found.items[0]].values if _is_place(found) else None
        if isinstance(values, list) and values and all(type(value) is int for value in values):
            values = torch.tensor(values)
        return batches.labels((None, values))

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """All samples in as few batches as possible, each with the indices of its samples."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row, form in enumerate(zip(*(column.forms() for column in self.columns), strict=True)):
            groups.setdefault(form, []).append(row)
        for index in chain(*(torch.tensor(group).split(self.limit or len(self)) for group in groups.values())):
            columns = (self if len(index) == len(self) else self.select(index)).columns
            paddings = [column.padding if isinstance(column.values, list) else None for column in columns]
            entries = trim([column.joined() for column in columns], paddings)
            ordered = [
                entry.movedim(0, column.dim).contiguous() if column.kind == "tensor" and column.dim else entry
                for column, entry in zip(columns, entries, strict=True)
            ]
            yield put_together(_filled(self.tree, ordered)), index

    def append(self, other: "Rows") -> "Rows":
        """The samples of both.

        Raises:
            CannotBeKeptError: If their batches differ in structure.
        """
        self._check(other)
        return replace(self, columns=tuple(map(Column.append, self.columns, other.columns)))

    def put(self, slots: Tensor, other: "Rows") -> "Rows":
        """The samples with others at ``slots``; they may be written over.

        Raises:
            CannotBeKeptError: If their batches differ in structure.
        """
        self._check(other)
        pairs = zip(self.columns, other.columns, strict=True)
        return replace(self, columns=tuple(mine.put(slots, others) for mine, others in pairs))

    def copy(self) -> "Rows":
        """The same samples in memory of their own."""
        return replace(self, columns=tuple(column.copy() for column in self.columns))

    @property
    def is_list(self) -> bool:
        """Whether the batch is a list of samples."""
        return _is_place(self.tree)

    def fits(self, other: "Rows") -> bool:
        """Whether the samples come from batches of the same structure."""
        kinds = [[(column.kind, column.dim) for column in rows.columns] for rows in (self, other)]
        return kinds[0] == kinds[1] and same(self.tree, other.tree)

    def padded(self) -> "Rows":
        """The same samples with the padding that is found in them, see :func:`find_padding`."""
        lengths: dict[tuple[int, ...], list[int]] = {}
        for number, column in enumerate(self.columns):
            if column.kind == "tensor" and column.padding is None and isinstance(column.values, list):
                shapes = {(*value.shape[:1], *value.shape[2:]) for value in column.values if value.dim() > 1}
                if len(shapes) == 1 and all(value.dim() > 1 for value in column.values):
                    lengths.setdefault(tuple(value.shape[1] for value in column.values), []).append(number)
        columns = list(self.columns)
        for numbers in lengths.values():
            found = find_padding([columns[number].values for number in numbers])
            for number, padding in zip(numbers, found or (), strict=found is not None):
                columns[number] = replace(columns[number], padding=padding)
        return replace(self, columns=tuple(columns))

    def state(self) -> dict[str, Any]:
        """The samples as a file can hold them."""
        columns = [column.state() for column in self.columns]
        return {"tree": to_plain(self.tree), "columns": columns, "limit": self.limit}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Rows":
        """The reverse of :meth:`state`."""
        return cls(from_plain(state["tree"]), tuple(map(Column.from_state, state["columns"])), state["limit"])

    def _check(self, other: "Rows") -> None:
        if not self.fits(other):
            raise CannotBeKeptError("their batches differ in structure")


def place(number: int) -> Container:
    """What stands in a tree of containers for the entry that is column ``number``."""
    return Container("place", (number,))


def label_of(batch: Any) -> Any:
    """The label of a batch or sample that was taken apart, found by position or name; None without any."""
    if not isinstance(batch, Container) or len(batch.items) < 2:
        return None
    if batch.kind in ("list", "tuple"):
        return batch.items[1]
    content = dict(zip(batch.keys, batch.items, strict=True))
    return next((content[key] for key in batches.LABEL_KEYS if key in content), None)


def _is_place(tree: Any) -> bool:
    return isinstance(tree, Container) and tree.kind == "place"


def _filled(tree: Any, entries: Sequence[Any]) -> Any:
    """The containers with the entries in their places."""
    if _is_place(tree):
        return entries[tree.items[0]]
    return Container(tree.kind, tuple(_filled(item, entries) for item in tree.items), tree.keys, tree.type)

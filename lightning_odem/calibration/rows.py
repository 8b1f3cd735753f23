"""Samples in columns: what batches are made of, sample by sample, whatever their containers and shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_odem.calibration import batches
from lightning_odem.calibration.batches import Kept
from lightning_odem.calibration.containers import (
    CannotBeKeptError,
    Container,
    change,
    from_plain,
    put_together,
    same,
    to_plain,
)


@dataclass(frozen=True)
class Pad:
    """How samples of different lengths are made equally long.

    Args:
        value: What is put in.
        at_start: Before a sample instead of behind it.
        trim: Whether samples may have more of it than their batch needs.
    """

    value: bool | int | float
    at_start: bool = False
    trim: bool = False


@dataclass(frozen=True)
class Column:
    """One entry of a batch, sample by sample.

    Args:
        kind: ``"tensor"``, of which each sample has a part; ``"list"`` or ``"tuple"`` of one value per sample; or
            ``"common"``, a value that belongs to the batch.
        values: A tensor [n, ...], or a list of n: of tensors [1, ...] that differ in shape, or of values.
        dim: Which dimension of the batch's tensor counts samples.
        pad: How tensors of different shapes are put in one; if None, they are never in one batch.
    """

    kind: str
    values: Any
    dim: int = 0
    pad: Pad | None = None

    def select(self, index: Tensor | slice) -> "Column":
        """The samples at ``index``, as copies."""
        if isinstance(self.values, Tensor):
            return replace(self, values=batches.select(self.values, index))
        if isinstance(index, Tensor):
            return replace(self, values=[self.values[row] for row in index.tolist()])
        return replace(self, values=self.values[index])

    def view(self, index: slice) -> "Column":
        """The samples of a range, sharing memory with these."""
        return replace(self, values=self.values[index])

    def copy(self) -> "Column":
        """The same with memory of its own."""
        if isinstance(self.values, Tensor):
            return replace(self, values=self.values.clone())
        return replace(self, values=[_copied(value) for value in self.values])

    def forms(self) -> list[Any]:
        """What samples have to have in common to be in one batch."""
        if self.kind == "common":
            known: list[Any] = []
            return [_number(value, known) for value in self.values]
        if self.kind != "tensor" or isinstance(self.values, Tensor):
            return [None] * len(self.values)
        return [value.dim() if self.pad else value.shape for value in self.values]

    def joined(self) -> Any:
        """This entry of the batch that the samples make."""
        if self.kind == "common":
            return self.values[0]
        if self.kind != "tensor":
            return Container(self.kind, tuple(self.values))
        values = self.values
        if not isinstance(values, Tensor):
            values = batches.concatenate(_padded(values, self.pad) if self.pad else values)
        return values

    def append(self, other: "Column") -> "Column":
        """The samples of two columns."""
        if self.kind != other.kind or self.dim != other.dim:
            raise CannotBeKeptError("their batches differ in structure")
        mine, others = self.values, other.values
        if isinstance(mine, Tensor) and isinstance(others, Tensor) and mine.shape[1:] == others.shape[1:]:
            return replace(self, values=batches.concatenate([mine, others]))
        return replace(self, values=[*_split(mine), *_split(others)])

    def put(self, slots: Tensor, other: "Column") -> "Column":
        """The column with samples of another in the places of some of its own, which it may write over."""
        mine, others = self.values, other.values
        if isinstance(mine, Tensor) and isinstance(others, Tensor) and mine.shape[1:] == others.shape[1:]:
            mine[slots] = others
            return self
        values = _split(mine)
        for slot, value in zip(slots.tolist(), _split(others), strict=True):
            values[slot] = value
        return replace(self, values=values)

    def state(self) -> dict[str, Any]:
        """As a file can hold it."""
        state: dict[str, Any] = {"kind": self.kind, "dim": self.dim}
        if self.pad is not None:
            state["pad"] = dict(vars(self.pad))
        if self.kind == "common":
            known: list[Any] = []
            state["which"] = torch.tensor([_number(value, known) for value in self.values], dtype=torch.long)
            return {**state, "values": [to_plain(value) for value in known]}
        return {**state, "values": self.values if isinstance(self.values, Tensor) else list(map(to_plain, self.values))}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Column":
        """The reverse of :meth:`state`."""
        values = state["values"]
        if not isinstance(values, Tensor):
            values = [from_plain(value) for value in values]
        if "which" in state:
            values = [values[index] for index in state["which"].tolist()]
        return cls(state["kind"], values, state["dim"], Pad(**state["pad"]) if "pad" in state else None)


@dataclass(frozen=True)
class Rows(Kept):
    """Samples of batches that are no tensors of one shape in plain containers.

    Args:
        tree: The batch's containers, with the numbers of columns in the places of what is in them.
        columns: The entries.
        limit: The most samples in one batch; 0 for any number.
    """

    tree: Any
    columns: tuple[Column, ...]
    limit: int = 0

    def __len__(self) -> int:
        return len(self.columns[0].values)

    def __getitem__(self, key: Any) -> Any:
        """One entry of the batch that all samples make: a tensor [n, ...], or a list of n."""
        keys = self.tree.keys or range(len(self.tree.items))
        place = self.tree.items[list(keys).index(key)]
        if not _is_place(place):
            raise KeyError(key)
        values = self.columns[place.items[0]].values
        return values if isinstance(values, Tensor) else [put_together(value) for value in values]

    def select(self, index: Tensor | slice) -> "Rows":
        """The samples at ``index``; tensors of one shape are copied."""
        return replace(self, columns=tuple(column.select(index) for column in self.columns))

    def view(self, index: slice) -> "Rows":
        """The samples of a range, sharing memory with these."""
        return replace(self, columns=tuple(column.view(index) for column in self.columns))

    def labels(self) -> Tensor | None:
        """Class labels, by the rule for batches of tensors; of lists too, if they are lists of integers."""
        found = label_of(self.tree)
        values = self.columns[found.items[0]].values if _is_place(found) else None
        if isinstance(values, list) and values and all(type(value) is int for value in values):
            values = torch.tensor(values)
        return batches.labels((None, values))

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Batches of all samples, as few as can be, each with the indices of its samples."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row, form in enumerate(zip(*(column.forms() for column in self.columns), strict=True)):
            groups.setdefault(form, []).append(row)
        for index in chain(*(torch.tensor(group).split(self.limit or len(self)) for group in groups.values())):
            columns = (self if len(index) == len(self) else self.select(index)).columns
            entries = _trimmed(columns, [column.joined() for column in columns])
            yield put_together(_filled(self.tree, entries)), index

    def append(self, other: "Rows") -> "Rows":
        """The samples of both.

        Raises:
            CannotBeKeptError: If their batches differ in structure.
        """
        self._check(other)
        return replace(self, columns=tuple(map(Column.append, self.columns, other.columns)))

    def put(self, slots: Tensor, other: "Rows") -> "Rows":
        """The samples with others in some of their places."""
        self._check(other)
        pairs = zip(self.columns, other.columns, strict=True)
        return replace(self, columns=tuple(mine.put(slots, others) for mine, others in pairs))

    def copy(self) -> "Rows":
        """The same with memory of their own."""
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
        """The same, with the padding that is found in samples from batches of different lengths.

        It is what samples end (or begin) with, for longer than by chance, in all entries of one length; but not all of
        them, for the longest of each batch has none.
        """
        lengths: dict[tuple[int, ...], list[int]] = {}
        for number, column in enumerate(self.columns):
            if column.kind == "tensor" and column.pad is None and isinstance(column.values, list):
                shapes = {(*value.shape[:1], *value.shape[2:]) for value in column.values if value.dim() > 1}
                if len(shapes) == 1 and all(value.dim() > 1 for value in column.values):
                    lengths.setdefault(tuple(value.shape[1] for value in column.values), []).append(number)
        columns = list(self.columns)
        for numbers in lengths.values():
            found = _find_padding([columns[number].values for number in numbers])
            for number, pad in zip(numbers, found or (), strict=found is not None):
                columns[number] = replace(columns[number], pad=pad)
        return replace(self, columns=tuple(columns))

    def state(self) -> dict[str, Any]:
        """As a file can hold it."""
        columns = [column.state() for column in self.columns]
        return {"tree": to_plain(self.tree), "columns": columns, "limit": self.limit}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Rows":
        """The reverse of :meth:`state`."""
        return cls(from_plain(state["tree"]), tuple(map(Column.from_state, state["columns"])), state["limit"])

    def _check(self, other: "Rows") -> None:
        if not self.fits(other):
            raise CannotBeKeptError("their batches differ in structure")


class Cutter:
    """Cuts a batch, taken apart, into samples.

    Args:
        size: Number of samples.
        lists: Whether a list of that length, within the batch, is one value per sample even if it may be something
            else.
        whole: Whether the batch itself may be a list of samples.
    """

    def __init__(self, size: int, lists: bool = False, whole: bool = True) -> None:
        self._size, self._lists, self._whole = size, lists, whole
        self._columns: list[Column] = []
        self._ones: list[Any] = []

    def cut(self, batch: Any) -> Rows:
        """The samples of one batch.

        Raises:
            CannotBeKeptError: If a tensor has another number of samples, or none has this one.
        """
        rows = Rows(self._cut(batch, 0), tuple(self._columns))
        if not any(column.kind != "common" for column in rows.columns):
            raise CannotBeKeptError("nothing in their batch counts the samples")
        return rows

    def align(self, whole: Any, again: Any, ones: Sequence[Any]) -> Rows:
        """The samples of a batch that are known as batches of one, too.

        Args:
            whole: The batch.
            again: The same batch, made a second time; in what is random it differs.
            ones: The samples, each as a batch of one.

        Raises:
            CannotBeKeptError: If the batch is not what the samples give by padding and stacking.
        """
        tree = self._align(whole, again, ones)
        if any(column.kind == "tensor" and isinstance(column.values, list) for column in self._columns):
            # What belongs together, such as a masked text and its labels, is drawn together.
            self._columns = [
                replace(column, values=own) if column.kind != "tensor" or isinstance(column.values, Tensor) else column
                for column, own in zip(self._columns, self._ones, strict=True)
            ]
        return Rows(tree, tuple(self._columns))

    def _place(self, column: Column, ones: Any = None) -> Container:
        self._columns.append(column)
        self._ones.append(ones)
        return Container("place", (len(self._columns) - 1,))

    def _cut(self, part: Any, depth: int) -> Container:
        if isinstance(part, Tensor) and part.dim():
            if len(part) != self._size:
                raise CannotBeKeptError(
                    f"the tensors of a batch disagree on the number of samples: {sorted({len(part), self._size})}"
                )
            return self._place(Column("tensor", part))
        if not isinstance(part, Container):
            return self._place(Column("common", [part] * self._size))
        is_list = part.kind in ("list", "tuple") and len(part.items) == self._size and (depth > 0 or self._whole)
        before = len(self._columns)
        if not (is_list and depth and self._lists):
            try:
                cut = Container(
                    part.kind, tuple(self._cut(item, depth + 1) for item in part.items), part.keys, part.type
                )
                if not is_list or any(column.kind != "common" for column in self._columns[before:]):
                    return cut
            except CannotBeKeptError:
                if not is_list:
                    raise
        del self._columns[before:], self._ones[before:]
        return self._place(Column(part.kind, list(part.items)))

    def _align(self, whole: Any, again: Any, ones: Sequence[Any]) -> Container:
        if isinstance(whole, Tensor) and all(isinstance(one, Tensor) for one in ones):
            return self._align_tensors(whole, not same(whole, again), ones)
        if not isinstance(whole, Container):
            if not all(same(whole, one) for one in ones):
                raise CannotBeKeptError(f"{whole!r:.60} in their batch depends on what is in the batch")
            return self._place(Column("common", [whole] * self._size), [whole] * self._size)
        alike = [one for one in ones if isinstance(one, Container) and (one.kind, one.type) == (whole.kind, whole.type)]
        if len(alike) == len(ones) and whole.kind in ("list", "tuple") and all(len(one.items) == 1 for one in alike):
            values = [one.items[0] for one in alike]
            is_random = not same(whole, again)
            if len(whole.items) == self._size and (is_random or all(map(same, whole.items, values))):
                return self._place(Column(whole.kind, list(whole.items)), values)
        every = [whole, again, *alike]
        if len(alike) != len(ones) or len({(part.keys, len(part.items)) for part in every}) != 1:
            raise CannotBeKeptError("their batches differ in structure")
        parts = zip(whole.items, again.items, zip(*(one.items for one in alike), strict=True), strict=True)
        return Container(whole.kind, tuple(self._align(*part) for part in parts), whole.keys, whole.type)

    def _align_tensors(self, whole: Tensor, is_random: bool, ones: Sequence[Tensor]) -> Container:
        dims = [
            dim
            for dim, size in enumerate(whole.shape)
            if size == self._size and all(one.dim() == whole.dim() and one.shape[dim] == 1 for one in ones)
        ]
        if not dims:
            if not all(same(whole, one) for one in ones):
                raise CannotBeKeptError("a tensor in their batch depends on what is in the batch")
            return self._place(Column("common", [whole] * self._size), [whole] * self._size)
        dim = dims[0]
        whole, ones = whole.movedim(dim, 0), [one.movedim(dim, 0) for one in ones]
        if all(one.shape[1:] == whole.shape[1:] for one in ones):
            together = batches.concatenate(ones)
            if not is_random and not torch.equal(together, whole):
                raise CannotBeKeptError("a tensor in their batch depends on what is in the batch")
            return self._place(Column("tensor", whole, dim), together)
        return self._place(Column("tensor", list(ones), dim, _learned_padding(whole, ones, is_random)))


def _learned_padding(whole: Tensor, ones: Sequence[Tensor], is_random: bool) -> Pad:
    """How samples became the batch [n, ...].

    Raises:
        CannotBeKeptError: If that was not by filling them up with one value, to the size of the largest.
    """
    largest = [max(one.shape[dim] for one in ones) for dim in range(1, whole.dim())]
    for at_start in (False, True) if largest == list(whole.shape[1:]) else ():
        values, fits = set(), True
        for row, one in zip(whole, ones, strict=True):
            pairs = zip(row.shape, one.shape[1:], strict=True)
            inner = tuple(slice(size - own, None) if at_start else slice(own) for size, own in pairs)
            outside = torch.ones_like(row, dtype=torch.bool)
            outside[inner] = False
            values.update(row[outside].unique().tolist())
            fits = fits and (is_random or torch.equal(row[inner], one[0]))
        if fits and len(values) == 1:
            return Pad(values.pop(), at_start)
    raise CannotBeKeptError("samples of different shapes are not padded with one value to the largest of them")


def _find_padding(entries: list[list[Tensor]]) -> list[Pad] | None:
    """The padding of entries that have the same lengths sample by sample, or None."""
    best: tuple[int, list[Pad] | None] = (0, None)
    for at_start in (False, True):
        excess: dict[tuple, int] = {}
        ending: dict[tuple, int] = {}
        for sample in zip(*entries, strict=True):
            flat = [(part.flip(1) if at_start else part)[0].reshape(part.shape[1], -1) for part in sample]
            if not flat[0].numel() or any(bool((part[-1] != part[-1, 0]).any()) for part in flat):
                continue
            repeated = torch.stack([(part == part[-1]).all(1) for part in flat]).all(0)
            value = tuple(part[-1, 0].item() for part in flat)
            run = int(repeated.flip(0).long().cumprod(0).sum())
            excess[value] = excess.get(value, 0) + run - 1
            ending[value] = ending.get(value, 0) + 1
        for value, score in excess.items():
            if score > best[0] and ending[value] < len(entries[0]):
                best = score, [Pad(part, at_start, trim=True) for part in value]
    return best[1]


def _padded(values: Sequence[Tensor], pad: Pad) -> list[Tensor]:
    largest = [max(value.shape[dim] for value in values) for dim in range(1, values[0].dim())]
    padded = []
    for value in values:
        whole = value.new_full((1, *largest), pad.value)
        pairs = zip(largest, value.shape[1:], strict=True)
        inner = tuple(slice(size - own, None) if pad.at_start else slice(own) for size, own in pairs)
        whole[0][inner] = value[0]
        padded.append(whole)
    return padded


def _trimmed(columns: Sequence[Column], entries: list[Any]) -> list[Any]:
    """The entries of a batch without padding that none of its samples needs, their samples counted where they were."""
    lengths: dict[tuple[int, bool], list[int]] = {}
    for number, column in enumerate(columns):
        if column.pad is not None and column.pad.trim and isinstance(column.values, list):
            lengths.setdefault((entries[number].shape[1], column.pad.at_start), []).append(number)
    for (length, at_start), numbers in lengths.items():
        empty = torch.ones(length, dtype=torch.bool)
        for number in numbers:
            pad = columns[number].pad
            assert pad is not None, "that is how they were chosen"
            empty &= (entries[number] == pad.value).transpose(0, 1).reshape(length, -1).all(1)
        needed = (~empty).nonzero().flatten()
        if len(needed):
            span = slice(int(needed[0]), None) if at_start else slice(int(needed[-1]) + 1)
            for number in numbers:
                entries[number] = entries[number][:, span].contiguous()
    return [
        entry.movedim(0, column.dim).contiguous() if column.kind == "tensor" and column.dim else entry
        for column, entry in zip(columns, entries, strict=True)
    ]


def _filled(tree: Any, entries: Sequence[Any]) -> Any:
    if _is_place(tree):
        return entries[tree.items[0]]
    return Container(tree.kind, tuple(_filled(item, entries) for item in tree.items), tree.keys, tree.type)


def _is_place(tree: Any) -> bool:
    return isinstance(tree, Container) and tree.kind == "place"


def _number(value: Any, known: list[Any]) -> int:
    """Index of a value among those known, to which it is added if it is new."""
    for index, other in enumerate(known):
        if value is other or same(value, other):
            return index
    known.append(value)
    return len(known) - 1


def _split(values: Any) -> list[Any]:
    return [values[row : row + 1] for row in range(len(values))] if isinstance(values, Tensor) else list(values)


def label_of(batch: Any) -> Any:
    """What a batch or a sample, taken apart, has in the place of its label; None if there is none."""
    if not isinstance(batch, Container) or len(batch.items) < 2:
        return None
    if batch.kind in ("list", "tuple"):
        return batch.items[1]
    content = dict(zip(batch.keys, batch.items, strict=True))
    return next((content[key] for key in batches.LABEL_KEYS if key in content), None)


def _copied(value: Any) -> Any:
    return change(value, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)

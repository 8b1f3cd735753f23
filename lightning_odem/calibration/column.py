"""One entry of batches, sample by sample."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_odem.calibration import batches
from lightning_odem.calibration.containers import CannotBeKeptError, Container, change, from_plain, same, to_plain
from lightning_odem.calibration.padding import Padding


@dataclass(frozen=True)
class Column:
    """One entry of a batch, sample by sample.

    Args:
        kind: ``"tensor"`` if each sample has a part of a tensor, ``"list"`` or ``"tuple"`` if it has one value, or
            ``"common"`` if the value belongs to the batch.
        values: A tensor [n, ...], or a list of n values. Tensors that differ in shape are a list of tensors [1, ...].
        dim: The dimension of the batch's tensor that counts samples.
        padding: How tensors of different shapes are joined. Without it they are never in one batch.
    """

    kind: str
    values: Any
    dim: int = 0
    padding: Padding | None = None

    def select(self, index: Tensor | slice) -> "Column":
        """The samples at ``index``; a tensor of all samples is copied."""
        if isinstance(self.values, Tensor):
            return replace(self, values=batches.select(self.values, index))
        if isinstance(index, Tensor):
            return replace(self, values=[self.values[row] for row in index.tolist()])
        return replace(self, values=self.values[index])

    def view(self, index: slice) -> "Column":
        """The samples of a range, sharing memory with these."""
        return replace(self, values=self.values[index])

    def copy(self) -> "Column":
        """The same samples in memory of their own."""
        if isinstance(self.values, Tensor):
            return replace(self, values=self.values.clone())
        return replace(self, values=[_copied(value) for value in self.values])

    def forms(self) -> list[Any]:
        """The form of each sample; samples of one form can be in one batch."""
        if self.kind == "common":
            known: list[Any] = []
            return [_number(value, known) for value in self.values]
        if self.kind != "tensor" or isinstance(self.values, Tensor):
            return [None] * len(self.values)
        return [value.dim() if self.padding else value.shape for value in self.values]

    def joined(self) -> Any:
        """The entry of a batch of all samples; a tensor counts them in its first dimension."""
        if self.kind == "common":
            return self.values[0]
        if self.kind != "tensor":
            return Container(self.kind, tuple(self.values))
        values = self.values
        if not isinstance(values, Tensor):
            values = batches.concatenate(self.padding.fill(values) if self.padding else values)
        return values

    def append(self, other: "Column") -> "Column":
        """The samples of both columns.

        Raises:
            CannotBeKeptError: If the columns are of different kinds.
        """
        if self.kind != other.kind or self.dim != other.dim:
            raise CannotBeKeptError("their batches differ in structure")
        if self._stacks_with(other):
            return replace(self, values=batches.concatenate([self.values, other.values]))
        return replace(self, values=[*_split(self.values), *_split(other.values)])

    def put(self, slots: Tensor, other: "Column") -> "Column":
        """The column with another's samples at ``slots``; it may write over its own values."""
        if self._stacks_with(other):
            self.values[slots] = other.values
            return self
        values = _split(self.values)
        for slot, value in zip(slots.tolist(), _split(other.values), strict=True):
            values[slot] = value
        return replace(self, values=values)

    def state(self) -> dict[str, Any]:
        """The column as a file can hold it; a common value is stored once."""
        state: dict[str, Any] = {"kind": self.kind, "dim": self.dim}
        if self.padding is not None:
            state["pad"] = dict(vars(self.padding))
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
        return cls(state["kind"], values, state["dim"], Padding(**state["pad"]) if "pad" in state else None)

    def _stacks_with(self, other: "Column") -> bool:
        mine, others = self.values, other.values
        return isinstance(mine, Tensor) and isinstance(others, Tensor) and mine.shape[1:] == others.shape[1:]


def _number(value: Any, known: list[Any]) -> int:
    """Index of a value among those known; a new value is added."""
    for index, other in enumerate(known):
        if value is other or same(value, other):
            return index
    known.append(value)
    return len(known) - 1


def _split(values: Tensor | Sequence[Any]) -> list[Any]:
    return [values[row : row + 1] for row in range(len(values))] if isinstance(values, Tensor) else list(values)


def _copied(value: Any) -> Any:
    return change(value, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)

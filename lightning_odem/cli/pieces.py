"""Parts of a model that are merged one after the other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.report import MergeRecord
from lightning_odem.stream.state import StreamState


class Piece:
    """Some tensors of the models, and the state of their stream between two merges.

    Args:
        names: Names of the tensors.
        new: The state before the first merge.
        path: Where the merged tensors lie meanwhile; by default in memory.

    Attributes:
        records: The records of the merges.
    """

    def __init__(self, names: list[str], new: StreamState, path: Path | None) -> None:
        self.names, self._state, self._path = names, new, path
        self.records: list[MergeRecord] = []

    def state(self, base: Snapshot | None) -> StreamState:
        """The state, with a base model."""
        on_disk = self._path is not None and self._path.exists()
        return replace(self._state, base=base, merged=load_file(str(self._path)) if on_disk else self._state.merged)

    def keep(self, state: StreamState) -> None:
        """Keep the next state, without the base model."""
        self._state = replace(state, base=None)
        if self._path is not None:
            draft = self._path.with_suffix(".next")  # the file may be mapped
            save_file(state.merged or {}, draft)
            draft.replace(self._path)
            self._state = replace(self._state, merged=None)


class UnknownSumError(Exception):
    """A method needs a sum that has not been taken over all parameters yet."""


class PieceSums:
    """Sums over parameters that are merged one after the other, found in several passes over all of them.

    In each pass, every part runs until it needs a sum that is not known yet, and adds what it has to this sum. The next
    pass knows it.

    Attributes:
        are_known: Whether all parts have run to their end in the last pass.

    Example:
        >>> import torch
        >>> from contextlib import suppress
        >>> sums = PieceSums()
        >>> while not sums.are_known:
        ...     for part in (1.0, 2.0):
        ...         number = torch.tensor(part)
        ...         with suppress(UnknownSumError):
        ...             sums.next_part()(number)
        ...             print(part, number)
        ...     sums.end_pass()
        1.0 tensor(3.)
        2.0 tensor(3.)
    """

    def __init__(self) -> None:
        self.are_known = False
        self._totals: list[Tensor] = []
        self._next: Tensor | None = None

    def next_part(self) -> Callable[[Tensor], None]:
        """The sums for the next part: each call is another one."""
        known = iter(self._totals)

        def sum_(numbers: Tensor) -> None:
            total = next(known, None)
            if total is None:
                self._next = numbers.clone() if self._next is None else self._next + numbers
                raise UnknownSumError
            numbers.copy_(total)

        return sum_

    def end_pass(self) -> None:
        """All parts have run."""
        self.are_known = self._next is None
        if self._next is not None:
            self._totals.append(self._next)
        self._next = None

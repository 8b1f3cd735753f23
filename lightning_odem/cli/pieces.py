"""Parts of a model that are merged one after the other."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_odem.methods import MergeContext, MergeMethod, method_name
from lightning_odem.methods.base import Summed, Whole
from lightning_odem.methods.kept_state import KeptState, copy_containers
from lightning_odem.methods.needs import BaseModel, Need
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.vector import is_finite
from lightning_odem.report import MergeRecord
from lightning_odem.stream.merging import check_finite, record_of


class Piece:
    """Some parameters of the models, merged into one vector from model to model.

    Args:
        shapes: Shapes of the parameters by name.
        dtype: Dtype of the vector.
        device: Where it is merged.
        path: Where the vector and the method's state lie between two merges, and what a method keeps between its calls
            for one merge; by default in memory.

    Attributes:
        records: The records of the merges.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, path: Path | None = None
    ) -> None:
        self._shapes, self._dtype, self._device, self._path = shapes, dtype, device, path
        self._sizes = [math.prod(shape) for shape in shapes.values()]
        self._merged: Tensor | None = None
        self._state: dict[str, Any] = {}
        self.records: list[MergeRecord] = []

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return list(self._shapes)

    def merge(
        self,
        method: MergeMethod,
        incoming: Snapshot,
        base: Snapshot | None,
        task: str,
        t: float,
        whole: Whole | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        """Merge the next model; if that fails, the piece stays what it was.

        Args:
            method: The merge method, which gets the state that it has for these parameters.
            incoming: The parameters of the incoming model by name.
            base: Those of the base model, or None.
            task: Name of the task.
            t: Operating time.
            whole: The model that the parameters are of.
            on_step: Called with the number of steps done and that of all steps.

        Raises:
            UnknownSumError: If the method needs a sum that is not known yet.
            ValueError: If a merged weight is not finite, or the method changed its state in place.
        """
        started = time.perf_counter()
        merged, state = self._open()
        method.load_state_dict(copy_containers(state))
        kept = KeptState(method)
        vector = self._vector(incoming)
        needed: dict[type[Need[Any]], Any] = {} if base is None else {BaseModel: self._vector(base)}
        names, shapes = list(self._shapes), list(self._shapes.values())
        if whole is not None and whole.summed is not None:
            whole = whole._replace(keep=self._keeping())
        context = MergeContext(names, shapes, needed, on_step, whole=whole)
        result = method.start(vector, context) if merged is None else method.merge(merged, vector, t, context)
        kept.check()
        if not is_finite(result.theta):
            check_finite([name for name, each in self._divided(result.theta) if not is_finite(each)], task, "merged")
        own = result.theta.data_ptr() not in (vector.data_ptr(), *(each.data_ptr() for each in needed.values()))
        self._merged = result.theta if own else result.theta.clone()
        self._state = copy_containers(method.state_dict())
        record = record_of(result, task=task, t=t, method=method_name(method))
        record.merge_seconds = time.perf_counter() - started
        self.records.append(record)

    def put_aside(self) -> None:
        """Write what was merged to the disk."""
        assert self._path is not None, "there is a place"
        assert self._merged is not None, "something was merged"
        _save({"merged": self._merged.cpu(), "state": self._state}, self._path)
        self._merged, self._state = None, {}
        for kept in self._path.parent.glob(f"{self._path.name}.kept*"):
            kept.unlink()

    def take(self) -> Snapshot:
        """The merged parameters by name, on the CPU; they are then forgotten."""
        assert self._merged is not None, "something was merged"
        tensors = dict(self._divided(self._merged.cpu()))
        self._merged, self._state = None, {}
        return tensors

    def _open(self) -> tuple[Tensor | None, dict[str, Any]]:
        """The vector, on the device, and the method's state."""
        if self._path is None or not self._path.exists():
            return self._merged, self._state
        found = _load(self._path)
        return found["merged"].to(self._device), found["state"]

    def _keeping(self) -> Callable[[Callable[[], Tensor]], Tensor]:
        """Computes tensors and keeps each on the disk until the merge is done."""
        calls = count()

        def keep(compute: Callable[[], Tensor]) -> Tensor:
            assert self._path is not None, "what is merged in several passes has a place"
            path = self._path.with_name(f"{self._path.name}.kept{next(calls)}")
            if path.exists():
                return _load(path)["kept"].to(self._device)
            found = compute()
            _save({"kept": found.cpu()}, path)
            return found

        return keep

    def _divided(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        for (name, shape), part in zip(self._shapes.items(), vector.split(self._sizes), strict=True):
            yield name, part.view(shape)

    def _vector(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameters one after the other; the tensor itself if there is one in the right form."""
        parts = [tensors[name].reshape(-1) for name in self._shapes]
        if len(parts) == 1:
            return parts[0].to(self._device, self._dtype)
        vector = torch.empty(sum(self._sizes), dtype=self._dtype, device=self._device)
        torch._foreach_copy_(vector.split(self._sizes), parts)
        return vector


def _save(value: dict[str, Any], path: Path) -> None:
    draft = path.with_suffix(f"{path.suffix}.next")  # the file may be mapped
    torch.save(value, draft)
    draft.replace(path)


def _load(path: Path) -> dict[str, Any]:
    """What was saved, mapped into memory; to write to it does not change the file."""
    return torch.load(path, mmap=True, weights_only=True)


class UnknownSumError(Exception):
    """A method needs a sum that has not been taken over all parameters yet."""


class PieceSums:
    """Sums over parameters that are merged one after the other, found in several passes over all of them.

    In each pass, every part runs until it needs a sum that is not known yet, and adds what it has to this sum. The next
    pass knows it. A part that has run to its end does not run again.

    Example:
        >>> import torch
        >>> sums, parts = PieceSums(), [1.0, 2.0]
        >>> while parts:
        ...     waiting = []
        ...     for part in parts:
        ...         try:
        ...             print(part, sums.next_part()(lambda: torch.tensor(part)))
        ...         except UnknownSumError:
        ...             waiting.append(part)
        ...     parts = waiting
        ...     sums.end_pass()
        1.0 tensor(3.)
        2.0 tensor(3.)
    """

    def __init__(self) -> None:
        self._totals: list[Tensor] = []
        self._next: Tensor | None = None

    def next_part(self) -> Summed:
        """The sums for the next part: each call is another one."""
        known = iter(self._totals)

        def summed(compute: Callable[[], Tensor], wanted: bool = True) -> Tensor:
            total = next(known, None)
            if total is not None:
                return total.clone()
            numbers = compute()
            self._next = numbers.clone() if self._next is None else self._next.add_(numbers)
            if wanted:
                raise UnknownSumError
            return numbers

        return summed

    def end_pass(self) -> None:
        """All parts that had not run to their end have run."""
        if self._next is not None:
            self._totals.append(self._next)
        self._next = None

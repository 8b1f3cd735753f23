"""Parts of a model that are merged one after the other."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from lightning_odem.cli.unfinished import UnfinishedMerge
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
        key: Begins the names of its results among those of the unfinished merge.
        unfinished: Where results lie between two merges, and what a method keeps between its calls for one merge.

    Attributes:
        records: The records of the merges.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: str,
        key: str,
        unfinished: UnfinishedMerge,
    ) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self._key, self._unfinished = key, unfinished
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
        """Merge the next model; if that fails, the piece has to be taken up again.

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
        merged, state = self._merged, self._state
        method.load_state_dict(copy_containers(state))
        kept = KeptState(method)
        vector = self._vector(incoming)
        needed: dict[type[Need[Any]], Any] = {} if base is None else {BaseModel: self._vector(base)}
        names, shapes = list(self._shapes), list(self._shapes.values())
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

    def put_aside(self, number: int) -> None:
        """Write what was merged to the disk, as the result of so many merges."""
        assert self._merged is not None, "something was merged"
        self._unfinished.save(f"{self._key}.{number}", {"merged": self._merged.cpu(), "state": self._state})
        self._merged, self._state = None, {}

    def take_up(self, number: int) -> bool:
        """Read the result of so many merges; tells whether there is one. No merge has no result."""
        found = self._unfinished.load(f"{self._key}.{number}") if number else {"merged": None, "state": {}}
        if found is not None:
            self._merged, self._state = found["merged"], found["state"]
            self._merged = None if self._merged is None else self._merged.to(self._device)
        return found is not None

    def drop(self) -> None:
        """Forget what is in memory."""
        self._merged, self._state = None, {}

    def take(self) -> Snapshot:
        """The merged parameters by name, on the CPU; they are then forgotten."""
        assert self._merged is not None, "something was merged"
        tensors = dict(self._divided(self._merged.cpu()))
        self.drop()
        return tensors

    def keeping(self, number: int) -> Callable[[Callable[[], Tensor]], Tensor]:
        """Computes tensors in the merge that follows so many, each once."""
        calls = count()

        def keep(compute: Callable[[], Tensor]) -> Tensor:
            name = f"{self._key}.{number}.kept{next(calls)}"
            if (known := self._unfinished.load(name)) is not None:
                return known["kept"].to(self._device)
            found = compute()
            self._unfinished.save(name, {"kept": found.cpu()})
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


class UnknownSumError(Exception):
    """A method needs a sum that has not been taken over all parameters yet."""


class PieceSums:
    """Sums over parameters that are merged one after the other, found in several passes over all of them.

    In each pass, every part runs until it needs a sum that is not known yet, and adds what it has to this sum. The next
    pass knows it. A part that has run to its end does not run again.

    Args:
        totals: Sums that are known.

    Attributes:
        totals: All sums that are known.

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

    def __init__(self, totals: Sequence[Tensor] = ()) -> None:
        self.totals = list(totals)
        self._next: Tensor | None = None

    def next_part(self) -> Summed:
        """The sums for the next part: each call is another one."""
        known = iter(self.totals)

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
            self.totals.append(self._next)
        self._next = None

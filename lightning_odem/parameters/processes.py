"""What the processes of one job share: sums, copies and errors."""

import itertools
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from lightning_odem.parameters.heartbeat import SILENCE, Heartbeat, LostProcessError

# Seconds between two looks for errors of other processes, and seconds that a failing process waits for the others.
_LOOK, _GRACE = 0.2, 60.0


class _Block(NamedTuple):
    """A block that this process is in; ``inner`` numbers the blocks within it.

    All processes enter the same blocks in the same order, so the numbers mean the same block in all of them.
    """

    name: str
    inner: Iterator[int]


# The first block is the whole run; no process waits at its end. An error may bring the numbering of inner blocks out of
# step, so the numbering ends together with the block.
_entered = [_Block("run", itertools.count())]
# Of the group that there is, from its first block on.
_heart: tuple[dist.Store, Heartbeat] | None = None


@dataclass(frozen=True)
class Processes:
    """The processes of torch.distributed's default group, seen from one of them; by default a single process.

    With a single process, none of the methods does anything.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.

    Example:
        >>> processes = Processes.current()
        >>> processes.rank, processes.size
        (0, 1)
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """The processes of the default group, or a single one if there is no group."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, in one all-reduce, with the same bits in all of them."""
        if self.size > 1:
            self._finish(dist.all_reduce(tensor, async_op=True), tensor.device.type == "cpu")
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by the one of the first process."""
        if self.size > 1:
            self._finish(dist.broadcast(tensor, src=0, async_op=True), tensor.device.type == "cpu")
        return tensor

    def exchange(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send consecutive pieces of a flat tensor to the processes, and receive theirs, both in the processes' order.

        Args:
            tensor: The pieces, one after the other.
            sent: Length of the piece for each process.
            received: Length of the piece from each process.
        """
        if self.size == 1:
            return tensor
        found = tensor.new_empty(sum(received))
        work = dist.all_to_all_single(found, tensor, list(received), list(sent), async_op=True)
        self._finish(work, tensor.device.type == "cpu")
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """End the block in all processes or in none: an error in one of them is raised in all.

        All processes enter the block, and each waits at its end until all have reached it. If one fails, the others
        learn of it there, and while they wait in :meth:`sum_` and :meth:`broadcast_`. They raise an error of the same
        type and message, whose ``__cause__`` names the process and has its traceback. If the type cannot be pickled,
        they raise a RuntimeError.

        If an error occurs while others wait in a sum, that sum never finishes and the group cannot be used for another
        one. After other errors the processes can go on. Blocks may be nested. Errors travel through the key-value store
        of the group. Without errors, only counters are exchanged at the end.

        Raises:
            LostProcessError: If a process that is waited for has ended without an error, as one that is killed.
            TimeoutError: If a process reaches neither the end nor an error within the group's timeout.
        """
        if self.size == 1:
            yield
            return
        store, block = _store(), f"{_entered[-1].name}/{next(_entered[-1].inner)}"
        with self._expecting_the_store():
            self._beat()
        _entered.append(_Block(block, itertools.count()))
        try:
            yield
            self._meet(store, block)
        except BaseException as error:
            with suppress(RuntimeError):  # without the process that holds the store, the error is raised here only
                if store.add(f"{block}/failed", 1) == 1:
                    store.set(f"{block}/error", _pack(error, self.rank))  # type: ignore[arg-type]
                if len(_entered) == 2:
                    # The store may end with this process, so wait until all have read it.
                    lost = error.count if isinstance(error, LostProcessError) else 0
                    _wait(lambda: store.add(f"{block}/failed", 0) >= self.size - lost, _GRACE)
            raise
        finally:
            _entered.pop()

    def _meet(self, store: dist.Store, block: str) -> None:
        """Wait for all processes at the end of a block."""
        with self._expecting_the_store():
            store.add(f"{block}/done", 1)

        def is_complete() -> bool:
            self._raise_errors(store)
            with self._expecting_the_store():
                return store.add(f"{block}/done", 0) == self.size

        limit: timedelta = store.timeout  # type: ignore[attr-defined]
        if not _wait(is_complete, limit.total_seconds()):
            raise TimeoutError(f"Within {limit} not all of {self.size} processes came to the end of a block.")
        if len(_entered) > 2:
            return
        with suppress(RuntimeError):  # the store is gone: no one needs it any more
            store.add(f"{block}/left", 1)
            if self.rank == 0:
                # The store may end with this process, so wait until all have seen that the block is complete.
                _wait(lambda: store.add(f"{block}/left", 0) >= self.size, _GRACE)

    def _finish(self, work: dist.Work | None, on_cpu: bool) -> None:
        """Wait for a collective, or for an error that keeps others from taking part in it."""
        assert work is not None, "every process is in the default group"
        while not work.is_completed():
            if on_cpu:
                with suppress(RuntimeError):  # from a timeout; any other error is raised by the last wait below
                    work.wait(timedelta(seconds=_LOOK))
            else:  # there a timeout would end the whole group
                _wait(work.is_completed, _LOOK)
            if not work.is_completed():
                self._raise_errors(_store())
        try:
            work.wait()
        except RuntimeError as error:  # a connection is lost when a process has ended
            self._raise_errors(_store())
            if "onnection" in str(error):
                _wait(lambda: self._raise_errors(_store()), SILENCE + _GRACE / 10)  # until it is known which one
            raise error

    def _raise_errors(self, store: dist.Store) -> bool:
        """Raise an error that another process had in one of the blocks that this process is in; False without one."""
        found = None
        try:
            for block in _entered[1:]:
                if found is None and store.check([f"{block.name}/error"]):
                    found = store.get(f"{block.name}/error")
            if found is None and len(_entered) > 1:
                self._beat().check()
        except LostProcessError:
            raise
        except RuntimeError as error:
            raise self._without_store() from error
        if found is not None:
            raise _unpack(found, self.size)
        return False

    @contextmanager
    def _expecting_the_store(self) -> Iterator[None]:
        """Tell of a lost process if the store is gone with it."""
        try:
            yield
        except dist.DistError as error:
            raise self._without_store() from error

    def _without_store(self) -> LostProcessError:
        return LostProcessError(
            f"Lost of {self.size} processes, counted from 0: the one that keeps their common store, as a rule "
            "process 0. Start the job again; the stream continues from its last merge."
        )

    def _beat(self) -> Heartbeat:
        """This process's heartbeat, from now on until the group ends."""
        global _heart
        group = _get_default_store()
        if _heart is None or _heart[0] is not group or not _heart[1].is_mine:
            if _heart is not None:
                _heart[1].stop()
            _heart = group, Heartbeat(_store(), self.rank, self.size)
        return _heart[1]


def _store() -> dist.Store:
    return dist.PrefixStore("lightning_odem", _get_default_store())


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; return whether it became true in time."""
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        if waited > seconds:
            return False
        time.sleep(min(max(waited / 10, 1e-4), 0.02))
    return True


def _pack(error: BaseException, rank: int) -> bytes:
    """An error as bytes: what is needed to rebuild it, and its text."""
    parts = b""
    with suppress(Exception):  # pickling runs code of the error's type, which may raise anything
        parts = pickle.dumps((type(error), error.args, vars(error)))
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return pickle.dumps((parts, f"{type(error).__name__}: {error}", rank, text))


def _unpack(data: bytes, size: int) -> BaseException:
    """The error of :func:`_pack`."""
    parts, summary, rank, text = pickle.loads(data)
    error: BaseException = RuntimeError(summary)
    with suppress(Exception):
        kind, args, attributes = pickle.loads(parts)
        # Not with the constructor, which may take arguments other than the message.
        error = kind.__new__(kind, *args)
        vars(error).update(attributes)
    error.__cause__ = RuntimeError(f"Raised in process {rank} of {size} (counted from 0):\n{text}")
    return error

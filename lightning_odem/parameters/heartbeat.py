"""Which processes of a job are still there: each tells it all the time, and those that wait look."""

import atexit
import os
import socket
import threading
import time
from contextlib import suppress

import torch.distributed as dist

BEAT = 2.0
"""Seconds between two beats."""
SILENCE = 40.0
"""Seconds without a beat after which a process counts as lost: all of its threads would have to stand still so long."""
_LOOK = 1.0


class LostProcessError(RuntimeError):
    """A process that others wait for has ended, or its machine cannot be reached.

    Args:
        message: What is known of it.
        count: How many are lost.
    """

    def __init__(self, message: str, count: int = 1) -> None:
        super().__init__(message)
        self.count = count


class Heartbeat:
    """Counts up a number in the store of a group for as long as this process lives, and watches those of the others.

    A process that is killed says nothing, and those that wait for it would wait for the group's timeout, half an hour
    by default. Clocks of different machines are not compared: a process is lost if its number has stood still for
    :data:`SILENCE` seconds. One that has not begun to count is not judged.

    Args:
        store: Store of the group.
        rank: Number of this process.
        size: Number of processes.

    Example:
        >>> heart = Heartbeat(dist.HashStore(), rank=0, size=2)
        >>> heart.check()  # process 1 has not begun
        >>> heart.stop()
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        # A connection of its own where there can be one: a wait in the other one is not to stop the beat.
        self._own = store
        with suppress(Exception):
            self._own = store.clone()
        self._store = store
        self._seen: dict[int, tuple[int, float]] = {}
        self._looked = -_LOOK
        self._ended = threading.Event()
        store.set(_name(rank), f"process {os.getpid()} on {socket.gethostname()}")
        store.add(_key(rank), 1)
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._beat, name="lightning_odem heartbeat", daemon=True)
        self._thread.start()
        # A thread that is inside the store when the interpreter ends would abort the process.
        atexit.register(self.stop)

    @property
    def is_mine(self) -> bool:
        """Whether it beats in this very process: a fork has no thread."""
        return self._process == os.getpid() and not self._ended.is_set()

    def stop(self) -> None:
        """Beat no more."""
        self._ended.set()
        if self._process == os.getpid():
            self._thread.join(BEAT)
        atexit.unregister(self.stop)

    def check(self) -> None:
        """Look for lost processes, once a second at most.

        Raises:
            LostProcessError: With their numbers, process ids and machines.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        lost = [rank for rank in range(self._size) if rank != self._rank and self._is_silent(rank, now)]
        if lost:
            named = ", ".join(f"{rank} ({self._store.get(_name(rank)).decode()})" for rank in lost)
            raise LostProcessError(
                f"Lost of {self._size} processes, counted from 0: {named}. Nothing was heard for {SILENCE:.0f} s: it "
                "was killed, perhaps for want of memory, or its machine cannot be reached. Start the job again; the "
                "stream goes on from its last merge.",
                len(lost),
            )

    def _is_silent(self, rank: int, now: float) -> bool:
        count = self._store.add(_key(rank), 0)
        before, since = self._seen.get(rank, (-1, now))
        if count != before:
            self._seen[rank] = (count, now)
        return count > 0 and count == before and now - since > SILENCE

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                self._own.add(_key(self._rank), 1)
            except RuntimeError:  # the store has ended with the process that has it
                self._ended.set()


def _key(rank: int) -> str:
    return f"alive/{rank}"


def _name(rank: int) -> str:
    return f"alive/{rank}/name"

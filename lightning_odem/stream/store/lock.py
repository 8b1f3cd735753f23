"""A lock, so that one process at a time uses a stream."""

import json
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_odem.parameters.files import make_writable, read_regular, replacing
from lightning_odem.stream.store.error import StreamInUseError


class StreamLock:
    """A lock file that is held until :meth:`release` or the end of the process, however the process ends.

    The lock is the system's (``flock``), so the files of a killed process lock nobody out. The file
    ``<name>.owner.json`` beside it names the holder for error messages.

    Args:
        path: The lock file. It stays when the lock is released.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lock = StreamLock(f"{folder}/stream.lock")
        ...     lock.acquire()
        ...     try:
        ...         StreamLock(f"{folder}/stream.lock").acquire()
        ...     except StreamInUseError as error:
        ...         print(str(error).endswith("go on in another directory."))
        ...     lock.release()
        True
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._owner = self.path.with_name(f"{self.path.name}.owner.json")
        # The process holds it, not one of its threads.
        self._lock = FileLock(self.path, thread_local=False)

    def acquire(self) -> None:
        """Take the lock, or raise at once; nothing happens if this object holds it.

        Raises:
            StreamInUseError: If another process holds it, or another object of this process.
            OSError: If the directory cannot be written.
        """
        if self._lock.is_locked:
            return
        make_writable(self.path.parent)
        try:
            self._lock.acquire(blocking=False)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            with replacing(self._owner) as draft:
                draft.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}))
        except Timeout:
            raise StreamInUseError(
                f"The stream in {self.path.parent} is in use by {self._read_owner()}. Wait for it to end, or go on in "
                "another directory."
            ) from None
        except OSError as error:
            self._lock.release()
            raise OSError(
                error.errno, f"The directory {self.path.parent} cannot be written: {error.strerror or error}."
            ) from error

    def release(self) -> None:
        """Give the lock back; nothing happens if this object does not hold it."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()

    def _read_owner(self) -> str:
        try:
            owner = json.loads(read_regular(self._owner))
            return f"process {owner['process']} on {owner['host']} since {owner['since']}"
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return f"a process unknown, as {self._owner.name} does not name it"

"""What a merge of files has computed before it was interrupted."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout

from lightning_odem.parameters.files import replacing

_JOURNAL, _LOCK = "merge.json", "lock"


class UnfinishedMerge:
    """Results of a merge on their way, in a folder from which the same merge goes on after it was killed.

    A result is a file with checksums, which gets its name when it is complete. The folder goes when the block ends,
    also with an error. It stays if the process is killed or the merge is interrupted from the keyboard.

    Args:
        path: The folder; made when there is something to keep.
        identity: Everything that the results depend on, as JSON can hold it. Results of a merge that differs in it are
            removed.

    Attributes:
        note: What was found there, in a line; empty if there was nothing.

    Raises:
        ValueError: If another process is making this merge, or there is something else in the place of the folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with UnfinishedMerge(Path(folder, ".merged"), {"method": "opcm"}) as unfinished:
        ...         unfinished.save("first", {"weight": torch.ones(2)})
        ...         unfinished.load("first"), unfinished.load("second")
        ({'weight': tensor([1., 1.])}, None)
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, json.dumps(identity, sort_keys=True)
        self._own: set[str] = set()
        self._lock = FileLock(path / _LOCK, thread_local=False)
        self.note = ""

    def __enter__(self) -> "UnfinishedMerge":
        if self._path.exists():
            self._check_ours()
            self._claim()
            found = sum(file.name not in (_JOURNAL, _LOCK) for file in self._path.iterdir())
            if self._is_same():
                self.note = f"An interrupted merge of the same models goes on, from {found} results in {self._path}."
            else:
                self.note = f"{self._path} was left by another merge that was interrupted; it is removed."
                self._remove()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            self._remove()
        self._lock.release()

    def save(self, name: str, value: dict[str, Any]) -> None:
        """Keep a result: tensors and numbers in plain containers."""
        if not self._lock.is_locked:
            self._path.mkdir()
            self._claim()
            with replacing(self._path / _JOURNAL) as draft:
                draft.write_text(self._identity, encoding="utf-8")
        draft = self._path / f"{name}.next"  # the file may be mapped
        torch.save(value, draft)
        draft.replace(self._path / name)
        self._own.add(name)

    def load(self, name: str) -> dict[str, Any] | None:
        """A result, mapped into memory, or None; to write to its tensors does not change the file."""
        path = self._path / name
        if not path.exists():
            return None
        if name not in self._own and not _is_intact(path):
            path.unlink()
            return None
        self._own.add(name)
        return torch.load(path, mmap=True, weights_only=True)

    def forget(self, pattern: str) -> None:
        """Remove results that are not needed any more."""
        for path in self._path.glob(pattern):
            path.unlink()

    def _check_ours(self) -> None:
        """Refuse a folder of somebody else's, which would be removed."""
        names = [file.name for file in self._path.iterdir()] if self._path.is_dir() else [""]
        if _JOURNAL not in names and not all(name == _LOCK or name.startswith(f".{_JOURNAL}") for name in names):
            raise ValueError(
                f"{self._path}, where a merge keeps what it has computed, was not left by one. Move it away, "
                "or choose another output."
            )

    def _claim(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"Another process merges into {self._path}. Wait for it to end, or choose another output."
            ) from None

    def _is_same(self) -> bool:
        try:
            return (self._path / _JOURNAL).read_text(encoding="utf-8") == self._identity
        except (OSError, UnicodeDecodeError):
            return False

    def _remove(self) -> None:
        self._lock.release()
        shutil.rmtree(self._path, ignore_errors=True)


def _is_intact(path: Path) -> bool:
    """Whether all checksums of a file are right; nothing else would notice a changed byte in mapped tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False

"""Files and folders that are written completely or not at all."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

_DRAFT = re.compile(r"\..+\.\d+")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file in one step: a reader sees the old or the new one, never half of it, even after a power failure.

    Yields:
        The path to write to. It replaces ``path`` at the end of the block and is removed if the block fails.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/new.txt") as draft:
        ...         _ = draft.write_text("complete")
        ...     Path(folder, "new.txt").read_text()
        'complete'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")  # _DRAFT
    draft.unlink(missing_ok=True)  # of a killed process with this number, or a pipe that would not end
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Write a folder that gets its name in one step, when it is complete and on the disk.

    Yields:
        An empty folder to write to. It takes the place of ``path`` at the end of the block and is removed if the block
        fails. An older folder there is moved aside first and put back if the new one cannot get its name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing_folder(f"{folder}/new") as draft:
        ...         _ = Path(draft, "a.txt").write_text("complete")
        ...     Path(folder, "new", "a.txt").read_text()
        'complete'
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, old = (path.with_name(f".{path.name}{kind}.{os.getpid()}") for kind in ("", ".old"))
    remove_folder(draft)  # of a killed process with this number
    draft.mkdir()
    try:
        yield draft
        for directory, _, files in os.walk(draft):
            for file in files:
                sync(Path(directory, file))
            sync(directory)
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(draft, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        sync(path.parent)
        remove_folder(old)
    finally:
        remove_folder(draft)


def make_writable(directory: str | os.PathLike) -> None:
    """Make a folder, and a file in it that goes again, so that what cannot be written is known before the work.

    Raises:
        OSError: If that fails; the message names the folder that is in the way, and its permissions.
    """
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        place = next(path for path in (directory, *directory.parents) if os.path.exists(path))  # seen by this user
        found = place.stat()
        what = f"{place} is a file"
        if place.is_dir():
            user = f", and this is user {os.getuid()}" if hasattr(os, "getuid") else ""
            what = f"{place} is of user {found.st_uid} with permissions {stat.filemode(found.st_mode)}{user}"
        raise OSError(
            error.errno,
            f"The directory {directory} cannot be written: {error.strerror or error}. {what}. Choose another "
            "directory, or change what is there.",
        ) from error


def remove_folder(path: str | os.PathLike) -> None:
    """Remove a folder as far as that is possible. What else there is stays, and a pipe is not waited for."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)


class NotRegularError(OSError):
    """A path that names a pipe or a device where a file was expected."""


def read_regular(path: str | os.PathLike) -> bytes:
    """The content of a regular file: to read a pipe or a device might never end.

    Raises:
        NotRegularError: If the path names something else.
        OSError: If it cannot be read.
    """
    # Not to wait for a writer of a pipe.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise NotRegularError(f"{path} is no regular file.")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def sync(path: str | os.PathLike) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk."""
    is_file = Path(path).is_file()
    try:
        descriptor = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Windows cannot open a directory, and some network file systems do not sync one.
        if is_file or error.errno not in (errno.EACCES, errno.EINVAL):
            raise


def remove_drafts(directory: str | os.PathLike) -> None:
    """Remove drafts that processes killed in :func:`replacing` left in a directory; no other process may be writing."""
    for path in Path(directory).glob(".*"):
        if _DRAFT.fullmatch(path.name):
            path.unlink(missing_ok=True)

"""The directory of a stream."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import nn

from lightning_odem.parameters.files import make_writable, remove_drafts
from lightning_odem.parameters.frozen_base import Digests
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.snapshot import Snapshot, whole_snapshot
from lightning_odem.report import StreamReport, save
from lightning_odem.stream.claim import (
    check_room,
    check_same_path,
    is_same_stream,
    is_taken_further,
    make_next_version,
    other_stream,
)
from lightning_odem.stream.merged_files import remove_unnamed, save_merged
from lightning_odem.stream.report_files import ReportFiles
from lightning_odem.stream.sections import check_sections
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store import StreamInUseError, StreamLock, StreamStateError, StreamStore
from lightning_odem.stream.store.reference import refer, resolve


class RunDirectory:
    """State, checkpoints, report, table and figures of one stream.

    The state is in the folder ``stream``, see :class:`~lightning_odem.stream.store.StreamStore`. While a Trainer fits a
    task of the stream, the directory belongs to its process.

    Args:
        dirpath: Its path; by default the next free ``merge_runs/version_N`` under the Trainer's ``default_root_dir``.
        mapped: Whether tensors stay on disk until they are used.
    """

    def __init__(self, dirpath: str | None, mapped: bool = False) -> None:
        self._mapped = mapped
        self.path: Path | None = None
        # The generation on disk that the state in memory comes from.
        self._number: int | None = None
        self._written: int | None = None  # by this process, and its report after it
        self._directory: Path | None = None
        self._files: ReportFiles
        self._store: StreamStore | None = None
        self._lock: StreamLock | None = None
        if dirpath is not None:
            self._open(Path(dirpath))

    def load(self) -> dict[str, Any] | None:
        """The stream's state on disk; None if there is none.

        Raises:
            StreamStateError: If it cannot be read; the message says what was found in which file.
        """
        state, self._number = self._load()
        return state

    def newer(self, state: StreamState) -> dict[str, Any] | None:
        """The stream's state where another process has taken it further than this one knows, else None.

        Raises:
            MisconfigurationException: If the directory holds another stream by now.
        """
        if self._store is None or self._store.number in (None, self._number):
            return None
        stored, number = self._load()
        if stored is None:
            return None
        if not is_same_stream(stored, state):
            assert self._directory is not None, "it was read"
            raise other_stream(self._directory, StreamReport.from_dict(stored["report"]), state)
        self._number = number
        return stored

    @property
    def holds_stream(self) -> bool:
        """Whether a state is on disk."""
        return self._store is not None and self._store.number is not None

    def read(self, like: StreamState) -> StreamState:
        """The state on disk; settings that it does not contain are those of ``like``."""
        before, stored = self._number, self.load()
        assert stored is not None, "there is one"
        state = replace(like, buffer=like.buffer.copy())
        state.load_state_dict(stored)
        if self._number == before:
            state.random = like.random  # the process recognises its own dict by identity
        return state

    def rewrite(self, state: StreamState) -> None:
        """Write a state of whole tensors, and the report, between two fits.

        Raises:
            OSError: If the state cannot be written. The state before is still there.
        """
        assert self._store is not None, "the directory is known"
        self._store.save(state.state_dict())
        self._number = self._store.number
        if self._mapped:
            state.map(self._store.map)
        self._files.write(state.report, first_path=len(state.report.merges))

    @property
    def lacks_base(self) -> bool:
        """Whether the file of the base model is damaged, and the stream was read without it."""
        return self._store is not None and "base" in self._store.lacking

    def mend_base(self, trainer: L.Trainer, module: nn.Module, base: Snapshot) -> None:
        """Write the base model again, from a module that still holds it.

        Raises:
            StreamStateError: If the module holds another one; the hash of the damaged file tells.
        """
        assert self._store is not None, "it was read"
        whole = whole_snapshot(module, base)
        mended = trainer.is_global_zero and self._store.mend("base", whole)
        if not trainer.strategy.broadcast(mended):
            raise StreamStateError(
                f"The file of the base model in {self.at('stream')} is damaged, and {type(module).__name__} does not "
                "hold that model: the hash is another one. Build the module with the pretrained weights that the "
                "stream began with, which are written again then, or put a copy of the file back."
            )
        rank_zero_warn(f"The base model in {self.at('stream')} was damaged and is written again from the module.")

    # ------------------------------------------------------------------------------------------- one process at a time

    def lock(self, trainer: L.Trainer) -> None:
        """Keep other processes from fitting tasks of the stream until :meth:`release`.

        Raises:
            StreamInUseError: If another process fits one; the message names the process.
        """
        if self._lock is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with Processes.current().together():
            if trainer.is_global_zero:
                make_writable(self.at(""))
                self._lock.acquire()
                remove_drafts(self._lock.path.parents[1])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the stream during a block outside of a fit.

        Raises:
            StreamInUseError: If another process uses it.
        """
        assert self._lock is not None, "the directory is known"
        self._lock.acquire()
        try:
            remove_drafts(self.at(""))
            yield
        finally:
            self._lock.release()

    def release(self) -> None:
        """Let other processes use the stream."""
        if self._lock is not None:
            self._lock.release()

    # ----------------------------------------------------------------------------------------------- the fit of a task

    def claim(self, trainer: L.Trainer, state: StreamState, resumed: bool = False) -> dict[str, Any] | None:
        """Take the directory for the stream of a fit and lock it; under ``fast_dev_run`` nothing is written.

        Args:
            trainer: The Trainer that fits a task.
            state: The state in memory.
            resumed: Whether it comes from one of Lightning's checkpoints.

        Returns:
            The state on disk if another process has merged more tasks since it was read; otherwise None.

        Raises:
            MisconfigurationException: If the directory holds another stream, or if the resumed task is merged already
                and the datamodule does not name its task.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        if self._store is None:
            wanted = state.dirpath or ""
            if not wanted and trainer.is_global_zero:
                wanted = str(make_next_version(Path(trainer.default_root_dir) / "merge_runs"))
            self._open(Path(trainer.strategy.broadcast(wanted)))
        assert self._store is not None, "opened"
        assert self._directory is not None, "opened"
        with Processes.current().together():
            check_same_path(trainer, self._directory)
        self.lock(trainer)
        newer, on_disk = None, state.report
        number = trainer.strategy.broadcast(self._store.number)
        if resumed or number != self._number or number is None:
            on_disk, stored, number = self._held(number)
            newer = stored if is_taken_further(self._directory, on_disk, stored, state, trainer, resumed) else None
            self._number = number
        if number is not None and number != self._written and trainer.is_global_zero:
            self._files.keep_evidence(on_disk)
        self.path, state.dirpath = self._directory, str(self._directory)
        return newer

    def check_room(self, trainer: L.Trainer, module: nn.Module, state: StreamState) -> None:
        """Refuse to train a task without room for its merge, see :func:`~lightning_odem.stream.claim.check_room`."""
        if self.path is not None and not trainer.fast_dev_run and trainer.is_global_zero:  # type: ignore[attr-defined]
            check_room(self.path, module, state)

    def commit(self, trainer: L.Trainer, module: nn.Module, state: StreamState) -> None:
        """Write the stream's state; a task counts as merged once this is done.

        Raises:
            OSError: If it cannot be written. The state before is still there.
        """
        if self.path is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self._store is not None, "claimed"
        whole = state.whole(module)
        with Processes.current().together():
            if trainer.is_global_zero:
                self._store.save(whole.state_dict())
        self._number = self._written = self._store.number
        if self._mapped:
            state.map(self._store.map)
            state.cut(module)

    def refer_to_samples(self) -> dict[str, Any] | None:
        """Where the calibration samples of the state in memory are on disk; None if they are not."""
        if self.path is None or self._store is None:
            return None
        return refer(self._store.section("buffer"), self._store.directory)

    def read_samples(self, reference: dict[str, Any]) -> Any:
        """The calibration samples that one of Lightning's checkpoints refers to, from this directory or its own.

        Raises:
            StreamStateError: If they are not there any more.
        """
        return resolve(reference, *([] if self._store is None else [self._store.directory]))

    # ------------------------------------------------------------------------------------------------ beside the state

    def at(self, name: str) -> Path:
        """The path of a file in the directory."""
        assert self._directory is not None, "the directory is known"
        return self._directory / name

    def save_checkpoint(self, trainer: L.Trainer, number: int, task: str, frozen: Digests | None = None) -> str | None:
        """Save the module's weights, see :func:`~lightning_odem.stream.merged_files.save_merged`."""
        if self.path is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        return str(save_merged(trainer, self.path, number, task, frozen))

    def remove_checkpoints(self, trainer: L.Trainer, named: StreamReport, kept: StreamReport) -> None:
        """Remove checkpoints that a report has named and does not name any more."""
        if self.path is not None and trainer.is_global_zero:
            remove_unnamed(self.path, named, kept)

    def save_report(self, trainer: L.Trainer, report: StreamReport) -> list[Path]:
        """Write the report, its page, table and figures in the main process, and return their files.

        If that fails there is only a warning, since they can be written again from the state.
        """
        if self.path is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            return self._files.write(report, first_path=-1)
        return []

    @rank_zero_only
    def finish_report(self, report: StreamReport) -> None:
        """Draw the figures that were left as they were in a long stream, at its end."""
        if self._directory is not None and self._files.behind:
            with suppress(StreamInUseError), self.locked():
                save(report, self._directory, first_path=len(report.merges))
                self._files.behind = False

    @rank_zero_only
    def mend_report(self, report: StreamReport) -> None:
        """Write the report again if it is behind the state, because a process died between writing the two."""
        if self._directory is None or not report.tasks:
            return
        files = self._files
        if files.hold(report):
            return
        try:
            with self.locked():
                if self._store is not None and self._store.number == self._number and not files.hold(report):
                    files.mend(report)
        except StreamInUseError:
            return  # who has the stream writes its report

    # --------------------------------------------------------------------------------------------------------- details

    def _open(self, directory: Path) -> None:
        directory = directory.absolute()  # wherever the process goes from here
        if directory.exists() and not directory.is_dir():
            raise MisconfigurationException(f"{directory} is a file; dirpath must name a directory.")
        self._directory = directory
        self._files = ReportFiles(directory)
        self._store = StreamStore(directory / "stream")
        self._lock = StreamLock(directory / "stream" / "lock")

    def _load(self) -> tuple[dict[str, Any] | None, int | None]:
        """The state on disk and the number of its generation."""
        assert self._store is not None, "the directory is known"
        number, state = self._store.number, self._store.load(self._mapped, check_sections, mendable=["base"])
        return (None, None) if state is None else ({**state, "dirpath": str(self._directory)}, number)

    def _held(self, number: int | None) -> tuple[StreamReport, dict[str, Any] | None, int | None]:
        """Report of the stream that the directory holds, its state and number."""
        if number is None:
            return self._files.read(), None, None
        state, number = self._load()
        assert state is not None, "it has a number"
        return StreamReport.from_dict(state["report"]), state, number

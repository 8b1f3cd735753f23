"""The directory a stream writes to."""

import re
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_odem.report import StreamReport, save
from lightning_odem.state import StreamState


class RunDirectory:
    """Checkpoints, report, table and figures of one stream; never of two.

    Args:
        dirpath: Where; by default the next free ``merge_runs/version_N`` under the Trainer's ``default_root_dir``.
    """

    def __init__(self, dirpath: str | None) -> None:
        self._wanted = dirpath
        self.path: Path | None = None

    def claim(self, trainer: L.Trainer, state: StreamState) -> None:
        """Settle where the stream writes, on its first fit; nowhere under ``fast_dev_run``.

        Raises:
            MisconfigurationException: If the directory holds another stream already.
        """
        if trainer.fast_dev_run or self.path is not None:  # type: ignore[attr-defined]
            return
        wanted = self._wanted or state.dirpath or ""
        if not wanted and trainer.is_global_zero:
            wanted = str(_make_next_version(Path(trainer.default_root_dir) / "merge_runs"))
        path = Path(trainer.strategy.broadcast(wanted))
        held = _tasks_in(path)
        # The process that wrote the checkpoint may have merged that task before it ended.
        resumed = [*state.report.tasks, state.started.get("task")] if state.dirpath == str(path) else []
        if held and held not in (state.report.tasks, resumed):
            raise MisconfigurationException(
                f"{path} holds another stream already (tasks merged there: {', '.join(held)}; in this stream: "
                f"{', '.join(state.report.tasks) or 'none'}). Choose another dirpath, or move that one away."
            )
        self.path, state.dirpath = path, str(path)

    def save_checkpoint(self, trainer: L.Trainer, number: int, task: str) -> str | None:
        """Save the module's weights, and nothing of the optimizer, as ``merged-<number>-<task>.ckpt``."""
        if self.path is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        path = self.path / f"merged-{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', task)}.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        return str(path)

    def save_report(self, trainer: L.Trainer, report: StreamReport) -> None:
        """Write ``report.json``, ``table.txt`` and the figures, from the main process."""
        if self.path is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            save(report, self.path, first_path=-1)


def _make_next_version(root: Path) -> Path:
    """Make the next free directory; two processes that ask at once get two."""
    root.mkdir(parents=True, exist_ok=True)
    while True:
        taken = [int(entry.name[8:]) for entry in root.glob("version_*") if entry.name[8:].isdigit()]
        path = root / f"version_{max(taken, default=-1) + 1}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def _tasks_in(path: Path) -> list[str]:
    if path.exists() and not path.is_dir():
        raise MisconfigurationException(f"{path} is a file; dirpath must name a directory.")
    report = path / "report.json"
    return StreamReport.load(report).tasks if report.exists() else []

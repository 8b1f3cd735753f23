"""Fine-tuned weights that would otherwise be lost with a merge that fails."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_odem.parameters.shards import weights_checkpoint


@contextmanager
def rescuing(trainer: L.Trainer, directory: Path | None, name: str) -> Iterator[None]:
    """Save the module's weights if the block fails, in the first place that takes them, and say where.

    Tried are ``directory``, the Trainer's root directory and the system's directory for temporary files. Nothing is
    written under ``fast_dev_run``.

    Args:
        trainer: The Trainer; its module holds the fine-tuned weights again when the block has failed.
        directory: Directory of the stream, or None.
        name: Name of the file.
    """
    try:
        yield
    except BaseException as error:  # Ctrl-C too
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            places = [directory, Path(trainer.default_root_dir), Path(tempfile.gettempdir())]
            saved = _save(trainer, [place / name for place in places if place is not None])
            where = f"are saved in {saved}" if saved else "could not be saved anywhere; the module in memory holds them"
            rank_zero_warn(f"The merge failed with {type(error).__name__}. The fine-tuned weights {where}.")
        raise


def _save(trainer: L.Trainer, paths: list[Path]) -> Path | None:
    checkpoint = weights_checkpoint(trainer)  # by all processes together
    for path in paths if trainer.is_global_zero else []:
        try:
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
        except (OSError, RuntimeError):  # torch reports a full disk by the latter
            continue
        return path
    return None

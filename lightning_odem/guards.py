"""Trainers and callbacks that do not go with merging at the end of training, and what to do instead."""

from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn


def check_trainer(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuse what would lose or overwrite a merge, before any training.

    Raises:
        MisconfigurationException: For sharded strategies, launchers that start copies of this process, and averaging
            callbacks behind ``callback``; the message names the way out.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"{type(strategy).__name__} shards the parameters, and a merge needs them whole. Fine-tune with "
            "strategy='ddp' or on one device."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            "Launchers that spawn or fork (ddp_spawn, ddp_notebook) run training in copies of this process, where the "
            "state of the stream would be lost. Use strategy='ddp' in a script."
        )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    behind = callbacks[callbacks.index(callback) + 1 :]
    averaging = [other for other in behind if isinstance(other, (StochasticWeightAveraging, WeightAveraging))]
    if averaging:
        name = type(averaging[0]).__name__
        raise MisconfigurationException(
            f"{name} behind {type(callback).__name__} would overwrite the merged weights with its averages. "
            f"Put {name} before it: callbacks=[{name}(...), {type(callback).__name__}(...)]."
        )
    if any(isinstance(other, ModelCheckpoint) and other.save_weights_only for other in callbacks):
        rank_zero_warn(
            "ModelCheckpoint(save_weights_only=True) leaves the stream's state out of its files: a task resumed from "
            "one of them cannot be merged into the stream. Set save_weights_only=False to be able to resume."
        )


class FreshStart:
    """Makes every fit of a Trainer train one task from its first epoch, with early stopping that starts anew.

    Lightning's Trainer and EarlyStopping remember the previous fit: a second ``fit`` would return at once, and a task
    would be stopped by the scores of the one before.
    """

    def __init__(self) -> None:
        self._limits: WeakKeyDictionary[L.Trainer, tuple[int, int]] = WeakKeyDictionary()
        self._stopping: WeakKeyDictionary[EarlyStopping, dict] = WeakKeyDictionary()

    def prepare(self, trainer: L.Trainer) -> None:
        """Reset what the previous fit left, unless this fit resumes one (``ckpt_path``)."""
        if trainer.ckpt_path is not None:
            return
        loop = trainer.fit_loop
        if trainer in self._limits:
            self._extend(trainer)
        else:
            self._limits[trainer] = (loop.max_epochs if loop.max_epochs is not None else -1, loop.max_steps)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping):
                if callback in self._stopping:
                    callback.load_state_dict(self._stopping[callback])
                else:
                    self._stopping[callback] = dict(callback.state_dict())
            elif isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
                rank_zero_warn(
                    f"ModelCheckpoint(monitor={callback.monitor!r}) still ranks by the scores of the task before: give "
                    "each task's Trainer a ModelCheckpoint of its own, or leave monitor unset."
                )

    def _extend(self, trainer: L.Trainer) -> None:
        loop = trainer.fit_loop
        max_epochs, max_steps = self._limits[trainer]
        if loop.max_epochs == max_epochs:
            # Epochs count from 0 again, so that schedules built from trainer.estimated_stepping_batches fit the task.
            loop.epoch_progress.reset()
        if max_steps != -1 and loop.max_steps <= trainer.global_step:
            loop.epoch_loop.max_steps = trainer.global_step + max_steps
        rank_zero_info("This Trainer has trained before: the next task starts at epoch 0 again.")

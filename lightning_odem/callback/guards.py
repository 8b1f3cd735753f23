"""Trainers and callbacks that do not go with merging at the end of training, and what to do instead."""

from copy import deepcopy
from multiprocessing.context import get_spawning_popen
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

_AVERAGING = (StochasticWeightAveraging, WeightAveraging)
_COPIES = (
    "Launchers that spawn or fork (ddp_spawn, ddp_notebook) run training in copies of this process, where the state of "
    "the stream would be lost. Use strategy='ddp' in a script."
)
_CONVERT = (
    "convert each checkpoint folder to one file with convert_zero_checkpoint_to_fp32_state_dict(folder, file) from "
    "lightning.pytorch.utilities.deepspeed, "
)


def check_trainer(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuse what would lose or overwrite a merge, before any training.

    Raises:
        MisconfigurationException: For strategies whose shards cannot be merged, launchers that start copies of this
            process, and averaging callbacks behind ``callback``; the message names the way out.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"{type(strategy).__name__} shards the parameters in a form of its own that cannot be merged. Use "
            "ModelParallelStrategy, which shards them by FSDP2, or strategy='ddp'; or fine-tune without this callback, "
            f"{_CONVERT if isinstance(strategy, DeepSpeedStrategy) else ''}and merge the saved checkpoints with "
            "`lightning-odem merge`."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(_COPIES)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    behind = callbacks[callbacks.index(callback) + 1 :]
    averaging = [other for other in behind if isinstance(other, _AVERAGING)]
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


def check_no_spawning() -> None:
    """Refuse to be pickled for a process that is being spawned: a launcher does that before any hook runs.

    Raises:
        MisconfigurationException: With the way out.
    """
    if get_spawning_popen() is not None:
        raise MisconfigurationException(_COPIES)


# What Lightning's callbacks remember of a fit and do not start anew on the next one.
_MEMORY: dict[type[L.Callback], tuple[str, ...]] = {
    EarlyStopping: ("wait_count", "stopped_epoch", "best_score", "stopping_reason", "stopping_reason_message"),
    ModelCheckpoint: (
        "best_k_models",
        "best_model_path",
        "best_model_score",
        "current_score",
        "kth_best_model_path",
        "kth_value",
        "last_model_path",
        "_last_checkpoint_saved",
        "_last_global_step_saved",
    ),
    StochasticWeightAveraging: (
        "n_averaged",
        "_initialized",
        "_init_n_averaged",
        "_latest_update_epoch",
        "_scheduler_state",
    ),
    Timer: ("_start_time", "_end_time", "_offset"),
    WeightAveraging: ("_latest_update_step", "_latest_update_epoch"),
}


class FreshStart:
    """Makes every fit train one task from its first epoch and step, whatever Trainer and callbacks were used before.

    Lightning's Trainer counts epochs and steps on from the previous fit, so a second ``fit`` would return at once.
    Callbacks shared by several fits remember the previous one: early stopping would stop a task by the scores of the
    one before, checkpointing would keep its best epochs and delete those of this one, weight averaging would take its
    first steps for done, a timer its time for up.
    """

    def __init__(self) -> None:
        self._limits: WeakKeyDictionary[L.Trainer, tuple[int | None, int]] = WeakKeyDictionary()
        self._memories: WeakKeyDictionary[L.Callback, dict[str, Any]] = WeakKeyDictionary()

    def prepare(self, trainer: L.Trainer) -> None:
        """Reset what the previous fit left; what a fit resumes (``ckpt_path``) is loaded afterwards."""
        limits = (trainer.fit_loop.max_epochs, trainer.fit_loop.max_steps)
        # Limits raised by hand are Lightning's own way to train on, and left to it.
        if self._limits.get(trainer) == limits:
            _rewind(trainer)
        self._limits.setdefault(trainer, limits)
        # Where a fit is given loaders, Lightning leaves the datamodule of the fit before in the Trainer.
        hooks = trainer._data_connector._datahook_selector
        trainer.datamodule = hooks and hooks.datamodule  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            names = [name for kind, names in _MEMORY.items() if isinstance(callback, kind) for name in names]
            memory = {name: vars(callback)[name] for name in names if name in vars(callback)}
            vars(callback).update(deepcopy(self._memories.setdefault(callback, deepcopy(memory))))


def _rewind(trainer: L.Trainer) -> None:
    """Count epochs and steps from 0 again; the step axis of the loggers goes on."""
    epochs = trainer.fit_loop
    batches = epochs.epoch_loop
    optimizations = batches.automatic_optimization.optim_progress, batches.manual_optimization.optim_step_progress
    for progress in (epochs.epoch_progress, batches.batch_progress, batches.scheduler_progress, *optimizations):
        progress.reset()
    rank_zero_info("This Trainer has trained before: the next task starts at epoch 0 again.")


def finish_averages(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Put the averages of a finished training into the module, where Lightning skips ``on_train_end``."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        in_place = isinstance(callback, StochasticWeightAveraging) and callback.pl_module_contains_batch_norm(module)
        if isinstance(callback, _AVERAGING) and not in_place:
            callback.on_train_end(trainer, module)


def release_averages(trainer: L.Trainer) -> None:
    """Let weight averaging forget its averages, now that the merged weights have taken their place.

    It would otherwise put them into the module for ``trainer.validate``, and into checkpoints saved after the fit.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback._average_model = None

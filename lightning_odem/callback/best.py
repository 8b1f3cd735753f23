"""The weights of a training's best epoch, as ModelCheckpoint knows it."""

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_odem.report.plain import plain


def find_ranking(trainer: L.Trainer) -> ModelCheckpoint:
    """The Trainer's ModelCheckpoint that ranks epochs.

    Raises:
        MisconfigurationException: If there is none, or more than one.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [one for one in callbacks if isinstance(one, ModelCheckpoint) and one.monitor is not None]
    if len(found) != 1:
        raise MisconfigurationException(
            "merge_weights='best' takes the best epoch of the Trainer's ModelCheckpoint(monitor=..., mode=...), and "
            f"there are {len(found)} of them with a monitor. Give the Trainer one, or set merge_weights='last'."
        )
    return found[0]


def hint_at_best(trainer: L.Trainer) -> None:
    """Say so if the epoch that a ModelCheckpoint ranks highest is not the last one, whose weights are merged."""
    for ranking in trainer.checkpoint_callbacks:
        if not isinstance(ranking, ModelCheckpoint) or ranking.monitor is None or ranking.best_model_score is None:
            continue
        last, best = trainer.callback_metrics.get(ranking.monitor), ranking.best_model_score
        if last is not None and float(last) != float(best):
            rank_zero_info(
                f"The weights of the last step are merged, {plain(ranking.monitor)} {last:.4g}; merge_weights='best' "
                f"would merge those with {best:.4g}."
            )


def load_best(trainer: L.Trainer) -> int | None:
    """Load the best epoch of the training that has just ended into the Trainer's module.

    Returns:
        The epoch, counted from 0; None if no epoch was ranked, with a warning: the module stays as it is.
    """
    ranking = find_ranking(trainer)
    path = ranking.best_model_path
    if not path:
        rank_zero_warn(
            f"ModelCheckpoint(monitor={ranking.monitor!r}) has saved no epoch of this training, so the weights of its "
            "last step are merged."
        )
        return None
    checkpoint = trainer.strategy.load_checkpoint(path)
    trainer.strategy.load_model_state_dict(checkpoint, strict=trainer.lightning_module.strict_loading)
    epoch = int(checkpoint["epoch"])
    found = f"{plain(str(ranking.monitor))} {ranking.best_model_score:.4g}"
    rank_zero_info(f"Merging the best weights of the training: epoch {epoch}, {found}.")
    return epoch

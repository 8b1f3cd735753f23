"""What the user has chosen for a stream."""

from dataclasses import dataclass

from lightning_odem.stream.naming import Weights


@dataclass(frozen=True)
class Settings:
    """The user's choices that decide what a fit does.

    Args:
        weights: Utility weights by task name or in the order of the tasks; None takes the datamodules'.
        finetune_from: ``"base"``, ``"merged"`` or ``"module"``: the weights that each training starts with.
        merge_weights: ``"last"`` or ``"best"``: the weights of a training that are merged.
        evaluate: ``"every"``, ``"last"``, a number n or False: after which merges all tasks are measured.
        keep_checkpoints: How many checkpoints of merged models stay; None keeps all.
    """

    weights: Weights
    finetune_from: str
    merge_weights: str
    evaluate: str | int | bool
    keep_checkpoints: int | None

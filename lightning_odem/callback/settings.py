"""What the user has chosen for a stream."""

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_odem.arguments import check_choice, check_instance, check_names
from lightning_odem.metrics import check_weights
from lightning_odem.stream.naming import Weights

FINETUNE_FROM = ("base", "merged", "module")
MERGE_WEIGHTS = ("last", "best")


@dataclass(frozen=True)
class Settings:
    """The user's choices that decide what a fit does.

    Args:
        weights: Utility weights by task name or in the order of the tasks; None takes the datamodules'.
        finetune_from: ``"base"``, ``"merged"`` or ``"module"``: the weights that each training starts with.
        merge_weights: ``"last"`` or ``"best"``: the weights of a training that are merged.
        evaluate: ``"every"``, ``"last"``, a number n or False: after which merges all tasks are measured.
        keep_checkpoints: How many checkpoints of merged models stay; None keeps all.

    Raises:
        ValueError: For an argument out of range.
    """

    weights: Weights
    finetune_from: str
    merge_weights: str
    evaluate: str | int | bool
    keep_checkpoints: int | None

    def __post_init__(self) -> None:
        check_choice("finetune_from", self.finetune_from, FINETUNE_FROM)
        check_choice("merge_weights", self.merge_weights, MERGE_WEIGHTS)
        evaluate, weights = self.evaluate, self.weights
        if evaluate not in ("every", "last") and evaluate is not False and not (type(evaluate) is int and evaluate > 0):
            raise ValueError(
                "evaluate is 'every' (all tasks after each merge), a number n (all tasks after every n-th merge, "
                f"otherwise the merged one), 'last' (all tasks after the last merge), or False; got {evaluate!r}."
            )
        if weights is not None:
            check_instance("weights", weights, (Mapping, list, tuple), "a list, or a dictionary by task name,")
            check_names("weights", list(weights) if isinstance(weights, Mapping) else ())
            check_weights(list(weights.values()) if isinstance(weights, Mapping) else weights)

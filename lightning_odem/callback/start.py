"""The weights that a training starts with."""

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_odem.parameters.division import Division
from lightning_odem.parameters.shards import find_shards
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store import differences, fingerprint

FINETUNE_FROM = ("base", "merged", "module")


class StartWeights:
    """Puts the base or the merged model into a module, as early as the module can take it.

    Tuners and finders run before a training and should see the weights that it starts with.

    Args:
        division: Which parameters all tasks share.
        finetune_from: ``"base"``, ``"merged"``, or ``"module"``: whatever the module holds.
    """

    def __init__(self, division: Division, finetune_from: str) -> None:
        self._division, self._finetune_from = division, finetune_from
        self._put: Snapshot | None = None

    def reset(self) -> None:
        """Forget the fit before."""
        self._put = None

    def begin(self, module: nn.Module, state: StreamState, is_new_process: bool, is_merged: bool) -> None:
        """Put the weights in when a fit is set up.

        Args:
            module: The module, with all of the stream's parameters.
            state: The stream.
            is_new_process: Whether the module was built for a stream that another process has begun.
            is_merged: Whether the module held the merged model when the last fit ended; a warning says so if its
                weights were changed since.
        """
        if state.base is None or find_shards(dict(module.named_parameters())) is not None:
            return
        if is_new_process and self._differing(module, state):
            return  # refused by complete, unless a checkpoint that is loaded by then gives the module its weights
        if is_merged and self._finetune_from != "module" and self._differing(module, state):
            rank_zero_warn(
                f"The weights of {type(module).__name__} were changed after the last merge: they are neither the base "
                f"nor the merged model. They are overwritten, since finetune_from={self._finetune_from!r}; "
                "finetune_from='module' would train from them."
            )
        self._load(module, state)

    def complete(self, module: nn.Module, state: StreamState, is_new_process: bool) -> None:
        """Put the weights in when the training starts, unless :meth:`begin` has; the first model becomes the base.

        Raises:
            ValueError: If the module did not start from the base model of a stream that another process has begun.
        """
        if is_new_process and self._put is None:
            self._check_base(module, state)
        if state.base is None:
            state.base = take_snapshot(module, self._division.shared(module))
        elif self._put is None or self._put is not self._wanted(state):
            self._load(module, state)

    def _check_base(self, module: nn.Module, state: StreamState) -> None:
        if differing := self._differing(module, state):
            found = take_snapshot(module, self._division.shared(module))
            prints = [fingerprint(weights)[:12] for weights in (state.base or {}, found)]
            raise ValueError(
                f"The stream in {state.dirpath} has another base model than {type(module).__name__} "
                f"({'; '.join(differing)}; SHA-256 {prints[0]}... and {prints[1]}...). Start with the weights that the "
                "stream began with, which load_base(module) of the callback writes into a module, or choose another "
                "dirpath."
            )

    def _wanted(self, state: StreamState) -> Snapshot | None:
        if self._finetune_from == "module":
            return None
        return (state.merged if self._finetune_from == "merged" else None) or state.base

    def _load(self, module: nn.Module, state: StreamState) -> None:
        self._put = self._wanted(state)
        if self._put is not None:
            load_snapshot(module, self._put, self._division.shared(module))

    def _differing(self, module: nn.Module, state: StreamState) -> list[str]:
        """How the module differs from the base model, if it differs from the merged one too."""
        found = take_snapshot(module, self._division.shared(module))
        merged = {name: value.to(found[name]) for name, value in (state.merged or {}).items() if name in found}
        differing = differences(state.base or {}, found)
        return differing if differing and differences(merged, found) else []

"""The weights that a training starts with."""

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_odem.parameters.adapters import Adapters
from lightning_odem.parameters.frozen_base import keep_frozen_when_loading
from lightning_odem.parameters.shards import find_shards
from lightning_odem.parameters.snapshot import Snapshot, derived_buffers, load_snapshot, take_snapshot
from lightning_odem.stream.growth import with_own_rows
from lightning_odem.stream.store import differences, fingerprint
from lightning_odem.stream.stream import Stream


class StartWeights:
    """Puts the base or the merged model into a module, as early as the module can take it.

    Tuners and finders run before a training and should see the weights that it starts with.

    Args:
        stream: The stream; its state takes up the shapes that the module has.
        finetune_from: ``"base"``, ``"merged"``, or ``"module"``: whatever the module holds.
    """

    def __init__(self, stream: Stream, finetune_from: str) -> None:
        self._stream, self._finetune_from = stream, finetune_from
        self._put: Snapshot | None = None
        self._before: Snapshot | None = None
        self.left: Snapshot = {}  # merged weights that a module may still hold, before those of another process

    def reset(self) -> None:
        """Forget the fit before."""
        self._put = self._before = None

    def keep(self) -> None:
        """Let the weights stay: the training begins."""
        self._before = None

    def take_back(self, module: nn.Module) -> None:
        """Give the module the weights that it had before a fit that was refused."""
        if self._before is not None:
            load_snapshot(module, self._before, lambda name: name in self._before)  # type: ignore[operator]
            self._before = None

    def begin(self, module: nn.Module, is_new_process: bool, is_merged: bool) -> None:
        """Put the weights in when a fit is set up.

        Args:
            module: The module, with all of the stream's parameters.
            is_new_process: Whether the module was built for a stream that another process has begun.
            is_merged: Whether the module held the merged model when the last fit ended; a warning says so if its
                weights were changed since.
        """
        if self._stream.state.base is None or find_shards(dict(module.named_parameters())) is not None:
            return
        before = take_snapshot(module, self._stream.division.shared(module))
        self._stream.grow(module)
        if is_new_process and self._differing(module):
            return  # refused by complete, unless a checkpoint that is loaded by then gives the module its weights
        if is_merged and self._finetune_from != "module" and self._differing(module):
            rank_zero_warn(
                f"The weights of {type(module).__name__} were changed after the last merge: they are neither the base "
                f"nor the merged model. They are overwritten, since finetune_from={self._finetune_from!r}; "
                "finetune_from='module' would train from them."
            )
        self._before = before
        self._load(module)

    def complete(self, module: nn.Module, is_new_process: bool) -> None:
        """Put the weights in when the training starts, unless :meth:`begin` has; the first model becomes the base.

        Raises:
            ValueError: If the module did not start from the base model of a stream that another process has begun.
        """
        self._stream.grow(module)
        state = self._stream.state
        if is_new_process and self._put is None:
            self._check_base(module)
        self.left = {}
        if state.base is None:
            self._stream.begin(module)
            if (adapters := Adapters(module, self._stream.division.patterns(module))).pairs:
                rank_zero_info(adapters.describe())
        else:
            self._stream.thaw(module)
            if self._put is None or self._put is not self._wanted():
                self._load(module)
        keep_frozen_when_loading(module, state.frozen)

    def _check_base(self, module: nn.Module) -> None:
        state = self._stream.state
        if differing := self._differing(module):
            found = take_snapshot(module, self._stream.division.shared(module))
            prints = [fingerprint(weights)[:12] for weights in (state.base or {}, found)]
            raise ValueError(
                f"The stream in {state.dirpath} has another base model than {type(module).__name__} "
                f"({'; '.join(differing)}; SHA-256 {prints[0]}... and {prints[1]}...). Start with the weights that the "
                "stream began with, which load_base(module) of the callback writes into a module, or choose another "
                "dirpath."
            )

    def _wanted(self) -> Snapshot | None:
        state = self._stream.state
        if self._finetune_from == "module":
            return None
        return (state.merged if self._finetune_from == "merged" else None) or state.base

    def _load(self, module: nn.Module) -> None:
        self._put = self._wanted()
        if self._put is not None:
            load_snapshot(module, self._put, self._stream.division.shared(module))

    def _differing(self, module: nn.Module) -> list[str]:
        """How the module differs from the base model, if it differs from the merged one too."""
        state, derived = self._stream.state, derived_buffers(module)
        found = take_snapshot(module, self._stream.division.shared(module))

        def kept(snapshot: Snapshot | None) -> Snapshot:
            known = {name: tensor for name, tensor in (snapshot or {}).items() if name not in derived}
            return with_own_rows(known, found, state.rows)  # a module that was built anew has other further rows

        merged = [
            {name: value.to(found[name]) for name, value in kept(one).items() if name in found}
            for one in (state.merged, self.left)
        ]
        differing = differences(kept(state.base), found)
        return differing if differing and all(differences(one, found) for one in merged) else []

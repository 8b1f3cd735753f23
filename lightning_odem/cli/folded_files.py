"""Checkpoints folded by their tensors alone, for any architecture."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_odem.cli.state_module import StateModule
from lightning_odem.parameters.adapter_folders import AdapterFolders
from lightning_odem.parameters.checkpoint import read_hyper_parameters
from lightning_odem.parameters.model_files import ModelFiles
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.vector import is_excluded
from lightning_odem.report import MergeRecord
from lightning_odem.stream.stream import Stream


class Incoming(NamedTuple):
    """A checkpoint to be merged.

    Args:
        path: Path of the checkpoint.
        task: Name of its task.
        weight: Utility weight.
    """

    path: str
    task: str
    weight: float


class FoldedFiles:
    """Folds checkpoints without a module that could compute with them.

    Args:
        incoming: The checkpoints; all are checked here, none is merged.
        base: Path of the base model, or None.
        device: Where merges are computed.
        exclude: Patterns of tensors that are not merged.
        adapters: The checkpoints as adapters, which are merged by their updates; by default whole models.
        read: Reads the tensors of a checkpoint; by default as they are in its file.
        **options: Further arguments of :class:`~lightning_odem.stream.stream.Stream`.

    Attributes:
        hyper_parameters: Entries for ``load_from_checkpoint``, from the first checkpoint.
        notes: What a user should know about the result, a line each.

    Raises:
        ValueError: If the models differ, or a pattern matches nothing.
    """

    def __init__(
        self,
        incoming: Sequence[Incoming],
        base: str | None,
        device: str,
        exclude: Sequence[str],
        adapters: AdapterFolders | None = None,
        read: Callable[[str | os.PathLike], dict[str, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        self._adapters = adapters
        read = read if adapters is None else adapters.read
        self._files = ModelFiles([entry.path for entry in incoming], base, exclude, read=read)
        excluded = self._files.excluded
        if idle := [pattern for pattern in exclude if not any(is_excluded(name, [pattern]) for name in excluded)]:
            raise ValueError(
                f"exclude={idle} matches no tensor in {incoming[0].path} or the others; those in all of them are: "
                f"{', '.join(self._files.like)}."
            )
        # Half precision would round after every merge.
        state = {
            name: torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))
            if like.is_floating_point()
            else like
            for name, like in self._files.like.items()
        }
        found = self._files.read(base) if base is not None else None
        if base is None and adapters is not None:
            found = adapters.no_update()
        self._module = StateModule(state).to(device)
        self._stream = Stream(base=found, **options)
        self._stream.division.check(self._module)
        self._excluded: Snapshot = {}
        self.notes: list[str] = []
        self.hyper_parameters = read_hyper_parameters(incoming[0].path)

    def fold(self, incoming: Incoming, on_step: Callable[[int, int], None]) -> MergeRecord:
        """Read and merge the next checkpoint."""
        path, task, weight = incoming
        record = self._stream.merge(self._module, self._files.read(path), task, weight, on_step=on_step)
        self._excluded |= self._files.read_excluded(path)
        return record

    def state(self) -> Snapshot:
        """The merged model, and the tensors of all checkpoints that were not merged."""
        return {**self.merged(), **self._excluded}

    def updates(self) -> Snapshot:
        """The tensors that were merged; of adapters the whole updates."""
        merged = self._stream.state.merged or {}
        return {name: merged[name].to(like.dtype) for name, like in self._files.like.items()}

    def merged(self) -> Snapshot:
        """The tensors that were merged; of adapters the factors of the merged updates."""
        state = self.updates()
        if self._adapters is None:
            return state
        state, cut = self._adapters.factors(state)
        if cut > 1e-5:
            of = self._adapters.rank_of
            self.notes.append(
                f"The rank of {of} holds all of the merged updates but {cut:.2%} (by norm), which is discarded."
            )
        return state

"""Checkpoints folded by their tensors alone, for any architecture."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_odem.cli.files_in_pieces import Advance, FilesInPieces, empty_like
from lightning_odem.cli.inputs import Incoming
from lightning_odem.cli.state_module import StateModule
from lightning_odem.cli.unfinished import UnfinishedMerge
from lightning_odem.methods import MergeMethod
from lightning_odem.parameters.adapter_folders import AdapterFolders
from lightning_odem.parameters.checkpoint import read_hyper_parameters
from lightning_odem.parameters.model_files import ModelFiles
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.vector import is_excluded
from lightning_odem.report import MergeRecord
from lightning_odem.stream.stream import Stream


class FoldedFiles:
    """Folds checkpoints without a module that could compute with them.

    If the method merges :attr:`by_tensor <lightning_odem.methods.MergeMethod>`, a few parameters at a time are read
    and merged, each from the first checkpoint to the last. Otherwise one whole incoming model is in memory at a time.

    Args:
        incoming: The checkpoints; all are checked here, none is merged.
        base: Path of the base model, or None.
        device: Where merges are computed.
        exclude: Patterns of tensors that are not merged.
        adapters: The checkpoints as adapters, which are merged by their updates; by default whole models.
        read: Reads the tensors of a checkpoint; by default as they are in its file.
        dtype: Dtype of the floating tensors of the result; by default the widest that each has in the models.
        method: The merge method.
        batch_norm: Policy for running statistics, see :class:`~lightning_odem.calibration.BatchNormStatistics`.

    Attributes:
        hyper_parameters: Entries for ``load_from_checkpoint``, from the first checkpoint.
        like: The merged tensors as they will be, without values.
        notes: What a user should know about the result, a line each.
        records: The record of each merge.

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
        dtype: torch.dtype | None = None,
        *,
        method: MergeMethod,
        batch_norm: str = "average",
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
        self._incoming, self._base, self._device, self._dtype = incoming, base, device, dtype
        self._batch_norm = batch_norm
        module = StateModule({name: empty_like(each, "meta") for name, each in self._files.like.items()})
        self._stream = Stream(method, batch_norm=batch_norm)
        self._stream.division.check(module)
        self._in_pieces = None
        if read is None and FilesInPieces.can_merge(method, module):
            self._in_pieces = FilesInPieces(self._files, module, incoming, base, method, device, batch_norm)
        self.like = self._rounded({name: each.to("meta") for name, each in self._files.like.items()})
        self.records: list[MergeRecord] = []
        self.notes: list[str] = []
        self.hyper_parameters = read_hyper_parameters(incoming[0].path)

    @property
    def excluded(self) -> Snapshot:
        """The tensors of all checkpoints that were not merged; the last checkpoint counts if several have the name."""
        found: Snapshot = {}
        for entry in self._incoming:
            found |= self._files.read_excluded(entry.path)
        return found

    @property
    def size(self) -> int:
        """Bytes that are merged, of all checkpoints together."""
        return len(self._incoming) * sum(each.nbytes for each in self._files.like.values())

    def merged(self, advance: Advance, unfinished: UnfinishedMerge | None = None) -> Iterator[Snapshot]:
        """Merge, and yield the merged tensors as they are done.

        Args:
            advance: Told of the progress.
            unfinished: Where what is merged lies meanwhile; None for models that are merged as a whole.
        """
        pieces = self._in_pieces
        if pieces is not None and unfinished is not None:
            found = pieces.merged(advance, unfinished)
        else:
            found = self._whole(advance)
        for piece in found:
            if self._dtype is None:
                piece = {name: tensor.to(self._files.like[name].dtype) for name, tensor in piece.items()}
            yield self._rounded(piece)
        self.records = self.records if pieces is None else pieces.records

    def unfinished(self, output: str | os.PathLike, identity: Mapping[str, Any]) -> UnfinishedMerge:
        """What an interrupted merge into this output has left, if it was the same one.

        Args:
            output: The output.
            identity: What distinguishes the merge, besides what is known here.
        """
        output = Path(output).absolute()
        groups = None if self._in_pieces is None else self._in_pieces.groups
        own = {"device": self._device, "dtype": str(self._dtype), "batch_norm": self._batch_norm, "pieces": groups}
        return UnfinishedMerge(output.with_name(f".{output.name}.merging"), {**identity, **own})

    def updates(self, advance: Advance) -> Snapshot:
        """Merge, and give all merged tensors at once; for adapters these are the whole updates."""
        return {name: each for piece in self.merged(advance) for name, each in piece.items()}

    def merged_adapter(self, advance: Advance) -> Snapshot:
        """Merge, and give the factors of the merged updates."""
        assert self._adapters is not None, "the checkpoints are adapters"
        state, cut = self._adapters.factors(self.updates(advance))
        if cut > 1e-5:
            of = self._adapters.rank_of
            self.notes.append(
                f"The rank of {of} holds all of the merged updates but {cut:.2%} (by norm), which is discarded."
            )
        return self._rounded(state)

    def _whole(self, advance: Advance) -> Iterator[Snapshot]:
        """Merge all tensors together."""
        base = None if self._base is None else self._files.read(self._base)
        if base is None and self._adapters is not None:
            base = self._adapters.no_update()
        stream, size = self._stream, self.size // len(self._incoming)
        stream.state = replace(stream.state, base=base)
        module = StateModule({name: empty_like(each, self._device) for name, each in self._files.like.items()})
        for number, (path, task, weight) in enumerate(self._incoming):

            def step(done: int, steps: int) -> None:
                advance(task, size * number + size * done // max(steps, 1))  # noqa: B023

            step(0, 1)
            self.records.append(stream.merge(module, self._files.read(path), task, weight, on_step=step))
        yield stream.state.merged or {}

    def _rounded(self, tensors: Mapping[str, torch.Tensor]) -> Snapshot:
        """Tensors in the dtype of the result.

        Raises:
            ValueError: If it cannot hold a value.
        """
        if self._dtype is None:
            return dict(tensors)
        rounded = {name: each.to(self._dtype) if each.is_floating_point() else each for name, each in tensors.items()}
        if broken := [
            name
            for name, each in rounded.items()
            if not each.is_meta and not each.isfinite().all() and tensors[name].isfinite().all()
        ]:
            raise ValueError(f"{', '.join(broken)} hold values that are too large for {self._dtype}.")
        return rounded

"""Checkpoints folded by their tensors alone, for any architecture."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from lightning_odem.cli.pieces import Piece, PieceSums, UnknownSumError
from lightning_odem.cli.state_module import StateModule
from lightning_odem.methods import MergeMethod
from lightning_odem.methods.base import Whole
from lightning_odem.parameters.adapter_folders import AdapterFolders
from lightning_odem.parameters.checkpoint import read_hyper_parameters
from lightning_odem.parameters.model_files import ModelFiles
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.vector import is_excluded
from lightning_odem.report import MergeRecord
from lightning_odem.stream.stream import Stream

# Bytes that are merged together, and their share of large models. Less would open the files more often.
_PIECE, _SHARE = 16 << 20, 1 / 64


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


Advance = Callable[[str, int], None]
"""Told what is merged, and how many bytes of all are done."""


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
        dtype: Dtype of the floating tensors of the result; by default the widest that each has in the models.
        method: The merge method.
        **options: Further arguments of :class:`~lightning_odem.stream.stream.Stream`.

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
        dtype: torch.dtype | None = None,
        *,
        method: MergeMethod,
        **options: Any,
    ) -> None:
        self._adapters = adapters
        read = None if adapters is None else adapters.read
        self._files = ModelFiles([entry.path for entry in incoming], base, exclude, read=read)
        excluded = self._files.excluded
        if idle := [pattern for pattern in exclude if not any(is_excluded(name, [pattern]) for name in excluded)]:
            raise ValueError(
                f"exclude={idle} matches no tensor in {incoming[0].path} or the others; those in all of them are: "
                f"{', '.join(self._files.like)}."
            )
        self._incoming, self._base, self._device, self._dtype = incoming, base, device, dtype
        self._module = self._empty(self._files.like, "meta")
        self._stream = Stream(method, **options)
        self._stream.division.check(self._module)
        self._new = self._stream.state
        self.like = self._rounded({name: each.to("meta") for name, each in self._files.like.items()})
        self.records: list[MergeRecord] = []
        self._done = 0
        self.notes: list[str] = []
        self.hyper_parameters = read_hyper_parameters(incoming[0].path)

    @property
    def excluded(self) -> Snapshot:
        """The tensors of all checkpoints that were not merged; of several with one name the last one."""
        found: Snapshot = {}
        for entry in self._incoming:
            found |= self._files.read_excluded(entry.path)
        return found

    @property
    def size(self) -> int:
        """Bytes that are merged, of all checkpoints together."""
        return len(self._incoming) * sum(each.nbytes for each in self._files.like.values())

    def merged(self, advance: Advance, scratch: str | os.PathLike) -> Iterator[Snapshot]:
        """Merge, and yield the merged tensors as they are done.

        Args:
            advance: Told of the progress.
            scratch: A folder with room for the merged model in fp32, for methods that look at all parameters between
                two merges.
        """
        pieces = self._pieces()
        shapes = {name: tuple(tensor.shape) for name, tensor in self._module.named_parameters()}
        in_step = self._stream.method.by_tensor == "sums" and len(pieces) > 1
        whole = Whole(shapes) if len(pieces) > 1 else None
        with TemporaryDirectory(dir=scratch, prefix=".merging") if in_step else nullcontext() as folder:
            kept = [
                Piece(names, self._new, Path(folder, str(index)) if folder else None)
                for index, names in enumerate(pieces)
            ]
            for entry in self._incoming if in_step else ():
                sums = PieceSums()
                while not sums.are_known:
                    for piece in kept:
                        with suppress(UnknownSumError):
                            self._merge(piece, [entry], Whole(shapes, sums.next_part()), advance)
                    sums.end_pass()
            while kept:
                if not in_step:
                    self._merge(kept[0], self._incoming, whole, advance)
                piece = kept.pop(0)
                seconds = [record.merge_seconds for record in self.records] or [0.0] * len(piece.records)
                self.records = [
                    replace(record, merge_seconds=record.merge_seconds + before)
                    for record, before in zip(piece.records, seconds, strict=True)
                ]
                merged = piece.state(None).merged or {}
                if self._dtype is None:
                    merged = {name: tensor.to(self._files.like[name].dtype) for name, tensor in merged.items()}
                yield self._rounded(merged)

    def merged_adapter(self, advance: Advance) -> Snapshot:
        """Merge, and give the factors of the merged updates."""
        assert self._adapters is not None, "the checkpoints are adapters"
        updates = {name: each for piece in self.merged(advance, os.curdir) for name, each in piece.items()}
        state, cut = self._adapters.factors(updates)
        if cut > 1e-5:
            self.notes.append(
                f"The rank of {self._adapters.first} holds all of the merged updates but {cut:.2%} (by norm), which is "
                "discarded."
            )
        return self._rounded(state)

    def _merge(self, piece: Piece, incoming: Sequence[Incoming], whole: Whole | None, advance: Advance) -> None:
        """Merge some of the tensors of some checkpoints."""
        names = piece.names
        base = self._files.read(self._base, names) if self._base is not None else None
        if self._base is None and self._adapters is not None:
            base = self._adapters.no_update()
        like = {name: self._files.like[name] for name in names}
        module = self._empty(like, self._device)
        stream = self._stream
        stream.state, stream.whole = piece.state(base), whole
        size = sum(each.nbytes for each in like.values())
        for path, task, weight in incoming:
            step = partial(self._step, advance, f"{names[0]} of {task}", size)
            step(0, 1)
            piece.records.append(stream.merge(module, self._files.read(path, names), task, weight, on_step=step))
            self._done += size
        piece.keep(stream.state)

    def _step(self, advance: Advance, what: str, size: int, done: int, steps: int) -> None:
        advance(what, self._done + size * done // max(steps, 1))

    def _pieces(self) -> list[list[str]]:
        """The tensors divided into those that are merged together, in the order of the flat vector."""
        parameters = {name: tensor.nbytes for name, tensor in self._module.named_parameters()}
        others = [name for name, _ in self._module.named_buffers()]
        wide = {tensor.dtype == torch.float64 for tensor in self._module.parameters()}
        # In one vector, all parameters are as wide as the widest.
        if not self._stream.method.by_tensor or self._adapters is not None or len(wide) > 1:
            return [[*parameters, *others]]
        pieces, held = [others], 0
        most = max(_PIECE, _SHARE * sum(parameters.values()))
        for name, size in parameters.items():
            if held and held + size > most:
                pieces.append([])
                held = 0
            pieces[-1].append(name)
            held += size
        return pieces

    def _empty(self, like: Mapping[str, torch.Tensor], device: str) -> StateModule:
        """A module for the tensors; half precision would round after every merge."""
        empty = {
            name: torch.empty(each.shape, dtype=torch.promote_types(each.dtype, torch.float32), device=device)
            if each.is_floating_point()
            else each.to(device)
            for name, each in like.items()
        }
        return StateModule(empty)

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

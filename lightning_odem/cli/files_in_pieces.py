"""Files of models that are merged a few parameters at a time."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from lightning_odem.calibration.batch_norm import BatchNormStatistics
from lightning_odem.cli.inputs import Incoming
from lightning_odem.cli.pieces import Piece, PieceSums, UnknownSumError
from lightning_odem.cli.state_module import StateModule
from lightning_odem.cli.unfinished import UnfinishedMerge
from lightning_odem.flow import operating_time
from lightning_odem.methods import MergeMethod, method_name
from lightning_odem.methods.base import Whole
from lightning_odem.methods.needs import BaseModel
from lightning_odem.parameters.model_files import ModelFiles
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot
from lightning_odem.report import MergeRecord
from lightning_odem.stream.merging import check_finite

# Bytes that are merged together, and their share of large models. Less would open the files more often.
_PIECE, _SHARE = 8 << 20, 1 / 256
# Seconds from which on the result of a piece is worth to be written, in case that the merge is interrupted.
_LONG = 1.0


Advance = Callable[[str, int], None]
"""Told what is merged, and how many bytes of all are done."""


class FilesInPieces:
    """Merges models that may be larger than the memory, a few parameters at a time.

    Each piece goes from the first checkpoint to the last. If the method needs sums over all parameters, all pieces go
    from one checkpoint to the next together, and lie in files meanwhile.

    Args:
        files: The models.
        module: A module of their tensors; values may be missing.
        incoming: The checkpoints.
        base: Path of the base model, or None.
        method: The merge method.
        device: Where merges are computed.
        batch_norm: Policy for running statistics, see :class:`~lightning_odem.calibration.BatchNormStatistics`.

    Attributes:
        groups: Names of the parameters that are merged together.
        records: The record of each merge; its seconds are right when all is merged.
    """

    def __init__(
        self,
        files: ModelFiles,
        module: StateModule,
        incoming: Sequence[Incoming],
        base: str | None,
        method: MergeMethod,
        device: str,
        batch_norm: str,
    ) -> None:
        self._files, self._incoming, self._base = files, incoming, base
        self._method, self._device, self._batch_norm = method, device, batch_norm
        self._parameters = dict(module.named_parameters())
        self._others = [name for name, _ in module.named_buffers()]
        weights = [entry.weight for entry in incoming]
        self._times = [operating_time(weights[: number + 1]) for number in range(len(weights))]
        self.groups = self._divide()
        self.records = [
            MergeRecord(task=entry.task, t=t, method=method_name(method), merge_seconds=0.0)
            for entry, t in zip(incoming, self._times, strict=True)
        ]
        self._done = 0

    @staticmethod
    def can_merge(method: MergeMethod, module: StateModule) -> bool:
        """Whether a method can merge a model in this way."""
        # In one vector, all parameters are as wide as the widest.
        wide = {tensor.dtype == torch.float64 for tensor in module.parameters()}
        return bool(method.by_tensor) and len(wide) == 1 and all(isinstance(need, BaseModel) for need in method.needs)

    def merged(self, advance: Advance, unfinished: UnfinishedMerge) -> Iterator[Snapshot]:
        """Merge, and yield the merged tensors in fp32 as they are done.

        Args:
            advance: Told of the progress.
            unfinished: Where what is merged lies meanwhile if the method needs sums, and what took long.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self._parameters.items()}
        dtype = next(iter(self._parameters.values())).dtype
        yield self._merged_others()
        pieces = [
            Piece({name: shapes[name] for name in names}, dtype, self._device, f"{index}", unfinished)
            for index, names in enumerate(self.groups)
        ]
        if self._method.by_tensor == "sums" and len(pieces) > 1:
            yield from self._in_step(pieces, shapes, advance, unfinished)
            return
        last = len(self._incoming)
        while pieces:
            piece = pieces.pop(0)
            if not piece.take_up(last):
                started = time.perf_counter()
                for number in range(last):
                    self._merge(piece, number, Whole(shapes) if len(self.groups) > 1 else None, advance)
                if time.perf_counter() - started > _LONG:
                    piece.put_aside(last)
                    piece.take_up(last)
            yield self._finished(piece)

    def _in_step(
        self,
        pieces: Sequence[Piece],
        shapes: Mapping[str, tuple[int, ...]],
        advance: Advance,
        unfinished: UnfinishedMerge,
    ) -> Iterator[Snapshot]:
        """Merge all pieces with one checkpoint, then with the next."""
        last = len(self._incoming) - 1
        # The latest merge that all pieces have behind them.
        begin = next(done for done in range(last, -1, -1) if all(piece.take_up(done) for piece in pieces))
        for number in range(begin, last + 1):
            sums, running = PieceSums(), list(pieces)
            while (known := unfinished.load(f"{number}.sum{len(sums.totals)}")) is not None:
                sums.totals.append(known["sum"])
            while running:
                waiting, before = [], len(sums.totals)
                for piece in running:
                    piece.take_up(number)
                    whole = Whole(shapes, sums.next_part(), piece.keeping(number))
                    try:
                        self._merge(piece, number, whole, advance)
                    except UnknownSumError:
                        piece.drop()
                        waiting.append(piece)
                        continue
                    if number == last:
                        yield self._finished(piece)
                    else:
                        piece.put_aside(number + 1)
                sums.end_pass()
                if len(sums.totals) > before and waiting:
                    unfinished.save(f"{number}.sum{before}", {"sum": sums.totals[-1]})
                running = waiting
            if number < last:
                for pattern in (f"*.{number}", f"*.{number}.*", f"{number}.sum*"):
                    unfinished.forget(pattern)

    def _merge(self, piece: Piece, number: int, whole: Whole | None, advance: Advance) -> None:
        """Merge some of the parameters of a checkpoint."""
        path, task, _ = self._incoming[number]
        base = None if self._base is None else self._files.read(self._base, piece.names)
        size = sum(self._files.like[name].nbytes for name in piece.names)
        step = partial(self._step, advance, f"{piece.names[0]} of {task}", size)
        step(0, 1)
        piece.merge(self._method, self._files.read(path, piece.names), base, task, self._times[number], whole, step)
        self._done += size

    def _merged_others(self) -> Snapshot:
        """What is merged besides parameters."""
        names = self._others
        module = StateModule({name: empty_like(self._files.like[name], "cpu") for name in names})
        statistics = BatchNormStatistics(module, (), self._batch_norm)
        merged: Snapshot = {}
        for (path, task, _), t in zip(self._incoming, self._times, strict=True):
            load_snapshot(module, self._files.read(path, names), lambda name: True)
            if merged:
                statistics.interpolate(merged, t)
            check_finite(statistics.not_finite(), task, "merged")
            merged = take_snapshot(module) if t else merged
        return merged

    def _step(self, advance: Advance, what: str, size: int, done: int, steps: int) -> None:
        advance(what, self._done + size * done // max(steps, 1))

    def _finished(self, piece: Piece) -> Snapshot:
        """The merged tensors of a piece, which forgets them; its seconds are added to those of the others."""
        for record in piece.records:
            ours = next(known for known in self.records if known.task == record.task)
            ours.merge_seconds += record.merge_seconds
        return piece.take()

    def _divide(self) -> list[list[str]]:
        """The parameters divided into those that are merged together, in the order of the flat vector."""
        groups: list[list[str]] = [[]]
        held = 0
        most = max(_PIECE, _SHARE * sum(tensor.nbytes for tensor in self._parameters.values()))
        for name, tensor in self._parameters.items():
            if held and held + tensor.nbytes > most:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += tensor.nbytes
        return groups


def empty_like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A place for a tensor to be merged: half precision would round after every merge."""
    if not tensor.is_floating_point():
        return tensor.to(device)
    return torch.empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=device)

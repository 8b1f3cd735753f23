"""Counts of correct and of all predictions, per cell of a table that grows with the stream."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors


class PredictionCounts(Metric):
    """States and input checks shared by the metrics of this package.

    The states ``correct`` and ``total`` are int64 tables of counts that :meth:`_count` grows as cells arrive.
    torchmetrics can only sum states of the same shape. The two overridden methods pad with zeros first, so that
    batches, copies and ranks that have seen different tasks can be added.
    """

    is_differentiable: bool = False
    full_state_update: bool = False

    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", default=torch.zeros(0, 0, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros(0, 0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, merge: int, task: int) -> None:
        """Count the predictions of the model after a merge on a batch of a task.

        Args:
            preds: Scores of shape [B, C], C of 2 or more, or class ids of shape [B].
            target: Class ids of shape [B].
            merge: 0-based index of the merge.
            task: 0-based index of the task, at most ``merge``.

        Raises:
            ValueError: If ``preds`` or ``target`` cannot be counted, or if not 0 <= ``task`` <= ``merge``.
        """
        if not 0 <= task <= merge:
            raise ValueError(f"Expected 0 <= task <= merge, got task {task} after merge {merge} (both count from 0).")
        self._count(preds, target, cell=(merge, task), shape=(merge + 1, merge + 1))

    def _count(self, preds: Tensor, target: Tensor, cell: tuple[int, int], shape: tuple[int, int]) -> None:
        """Add a batch to one cell, in tables of at least the given shape."""
        classes = _class_ids(preds, target)
        correct, total = torch.zeros(2, *shape, dtype=torch.int64, device=self.total.device)
        correct[cell] = (classes == target).sum()
        total[cell] = len(target)
        self._reduce_states({"correct": correct, "total": total})

    def _accuracy(self) -> Tensor:
        """Accuracy per cell, fp64, NaN where nothing was counted."""
        return self.correct.double() / self.total

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        for name in self._defaults:
            own, incoming = _pad_to_common_shape([getattr(self, name), incoming_state[name]])
            setattr(self, name, own + incoming)

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any | None = None) -> None:
        def gather(counts: Tensor, group: Any | None = None) -> list[Tensor]:
            return _pad_to_common_shape(dist_sync_fn(counts, group=group))

        super()._sync_dist(gather, process_group)


def _class_ids(preds: Tensor, target: Tensor) -> Tensor:
    """Predicted class ids [B] from scores [B, C] or class ids [B] that fit the target [B]."""
    if target.ndim != 1 or not _is_integer(target):
        raise ValueError(f"Expected integer `target` of shape [B], got {target.dtype} of shape {tuple(target.shape)}.")
    # A single column of scores does not choose between classes: its argmax is 0 whatever the score is.
    if preds.ndim not in (1, 2) or len(preds) != len(target) or preds.shape[1:] == (1,):
        raise ValueError(
            f"Expected `preds` of shape [B, C] (scores of 2 or more classes) or [B] (class ids) for {len(target)} "
            f"targets, got shape {tuple(preds.shape)}."
        )
    if preds.ndim == 1:
        if not _is_integer(preds):
            raise ValueError(f"`preds` of shape [B] must be integer class ids, got {preds.dtype}.")
        return preds
    invalid = preds.isnan().any(dim=1).nonzero().flatten().tolist()
    if invalid:
        raise ValueError(
            f"`preds` has NaN scores for {len(invalid)} of {len(preds)} samples, first at index {invalid[0]}."
        )
    return preds.argmax(dim=1)


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _pad_to_common_shape(counts: Sequence[Tensor]) -> list[Tensor]:
    """Append rows and columns of zeros until all tables [R, C] are as large as the largest."""
    rows, columns = (max(sizes) for sizes in zip(*(table.shape for table in counts), strict=True))
    return [F.pad(table, (0, columns - table.shape[1], 0, rows - table.shape[0])) for table in counts]

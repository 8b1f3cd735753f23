"""The summary numbers of a stream after every one of its merges, at the cost of reading each of its scores once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_odem.metrics.functional import weighted_mean


@dataclass(frozen=True)
class Summaries:
    """ACC_w, BWT_w, forgetting and forward transfer after each of the first K merges of a stream.

    Each is what :func:`~lightning_odem.metrics.weighted_accuracy`, :func:`~lightning_odem.metrics.backward_transfer`,
    :func:`~lightning_odem.metrics.forgetting` and :func:`~lightning_odem.metrics.forward_transfer` give for the first
    tasks, bit for bit. Those read a whole matrix for every merge. Here one more merge costs its row of the matrix.

    Args:
        acc: ACC_w after each merge.
        bwt: BWT_w after each merge.
        forgetting: Forgetting after each merge.
        fwt: Forward transfer after each merge.
        unmeasured: How many scores of each row were not measured, before the first one that was.
        gain: Score of each task after its own merge, shape [K], fp64; with its sign changed if lower is better.
        best: Best score of each task so far, likewise.

    Example:
        >>> first = Summaries().with_merge([0.7], [1.0], [math.nan], [0.1])
        >>> both = first.with_merge([0.6, 0.8], [1.0, 1.0], [math.nan, 0.5], [0.1, 0.25])
        >>> both.acc, both.fwt
        ([0.7, 0.7], [nan, 0.25])
    """

    acc: Sequence[float] = ()
    bwt: Sequence[float] = ()
    forgetting: Sequence[float] = ()
    fwt: Sequence[float] = ()
    unmeasured: Sequence[int] = ()
    gain: Tensor = torch.zeros(0, dtype=torch.float64)
    best: Tensor = torch.zeros(0, dtype=torch.float64)

    def with_merge(
        self,
        row: Sequence[float],
        weights: Sequence[float],
        before_training: Sequence[float],
        pretrained: Sequence[float],
        *,
        sign: float = 1.0,
        alike: bool = True,
    ) -> "Summaries":
        """The summaries with one more merge; these stay as they are.

        Args:
            row: Scores on all tasks after the merge, shape [K + 1].
            weights: Utility weight of each task.
            before_training: Score of the merged model on each task before its training.
            pretrained: Score of the base model on each task.
            sign: -1 if lower scores are better.
            alike: Whether the tasks have a common metric; otherwise all four are NaN.
        """
        last = len(row) - 1
        scores, shares, before, base = (
            torch.tensor(values, dtype=torch.float64) for values in (row, weights, before_training, pretrained)
        )
        signed = sign * scores
        now = signed[:last]
        found = [math.nan] * 4
        # The metrics refuse weights of which none is positive, but a stream may start with tasks of weight 0.
        if alike and shares.any():
            means = (
                weighted_mean(scores, shares),
                weighted_mean(now - self.gain, shares[:last]),
                weighted_mean(self.best - now, shares[:last]),
                weighted_mean((sign * before - sign * base)[1:], shares[1:]),
            )
            found = [mean.item() for mean in means]
        known = (~scores.isnan()).nonzero()
        first = int(known[0]) if len(known) else len(row)
        lists = (self.acc, self.bwt, self.forgetting, self.fwt)
        acc, bwt, forgetting, fwt = ([*values, value] for values, value in zip(lists, found, strict=True))
        gain = torch.cat([self.gain, signed[last:]])
        best = torch.cat([torch.maximum(self.best, now), signed[last:]])
        return replace(
            self,
            acc=acc,
            bwt=bwt,
            forgetting=forgetting,
            fwt=fwt,
            unmeasured=[*self.unmeasured, first],
            gain=gain,
            best=best,
        )

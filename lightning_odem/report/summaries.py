"""The summary numbers of a stream after every one of its merges, at the cost of reading its matrix once."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_odem.metrics.functional import weighted_mean


def summarize_merges(
    matrix: Tensor,
    weights: Sequence[float],
    before_training: Sequence[float],
    pretrained: Sequence[float],
    *,
    sign: float = 1.0,
    up_to: int | None = None,
) -> dict[str, list[float]]:
    """ACC_w, BWT_w, forgetting and forward transfer after every merge of a stream of K tasks.

    Each is what :func:`~lightning_odem.metrics.weighted_accuracy`, :func:`~lightning_odem.metrics.backward_transfer`,
    :func:`~lightning_odem.metrics.forgetting` and :func:`~lightning_odem.metrics.forward_transfer` give for the first
    tasks, bit for bit. Those read a whole matrix for every merge, which costs K^3 in all; this costs K^2.

    Args:
        matrix: Scores, shape [K, K], fp64; entries above the diagonal are ignored.
        weights: Utility weight of each task.
        before_training: Score of the merged model on each task before its training.
        pretrained: Score of the base model on each task.
        sign: -1 if lower scores are better.
        up_to: Merges whose tasks have a common metric; after later ones all is NaN.

    Returns:
        Lists of K numbers by the names ``acc``, ``bwt``, ``forgetting`` and ``fwt``.

    Example:
        >>> matrix = torch.tensor([[0.7, math.nan], [0.6, 0.8]], dtype=torch.float64)
        >>> found = summarize_merges(matrix, [1.0, 1.0], [math.nan, 0.5], [0.1, 0.25])
        >>> found["acc"], found["fwt"]
        ([0.7, 0.7], [nan, 0.25])
    """
    count = len(matrix)
    shares, signed = torch.tensor(weights, dtype=torch.float64), sign * matrix
    above = torch.ones_like(matrix, dtype=torch.bool).triu(1)
    best = signed.masked_fill(above, -math.inf).cummax(dim=0).values if count else signed
    gain = signed.diagonal()
    forward = sign * torch.tensor(before_training, dtype=torch.float64) - sign * torch.tensor(
        pretrained, dtype=torch.float64
    )
    found: dict[str, list[float]] = {"acc": [], "bwt": [], "forgetting": [], "fwt": []}
    counts = (shares > 0).tolist()
    for last in range(count):
        size, now = last + 1, signed[last, :last]
        # The metrics refuse weights of which none is positive, but a stream may start with tasks of weight 0.
        if not any(counts[:size]) or (up_to is not None and size > up_to):
            for values in found.values():
                values.append(math.nan)
            continue
        found["acc"].append(weighted_mean(matrix[last, :size], shares[:size]).item())
        found["bwt"].append(weighted_mean(now - gain[:last], shares[:last]).item())
        found["forgetting"].append(weighted_mean(best[last - 1, :last] - now, shares[:last]).item())
        found["fwt"].append(weighted_mean(forward[1:size], shares[1:size]).item())
    return found

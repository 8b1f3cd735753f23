r"""The metrics as pure functions of accuracies and utility weights.

All of them are weighted means with these rules in common:

- They are computed in fp64 and returned as a 0-dim tensor of the accuracies' dtype.
- Weights are relative: multiplying all of them by the same positive number changes nothing.
- An accuracy of NaN (not measured) makes the mean NaN, unless its task has weight 0 and so does not count.
- A mean over no task is undefined: NaN. So is a mean over tasks of weight 0 if another task of the stream has a weight.
- Scores may be of any metric. If lower scores are better (``higher_is_better=False``), BWT, forgetting and forward
  transfer use the scores with their sign changed. So a negative BWT means forgetting for every metric.
- Invalid weights (see :func:`check_weights`) and shapes that do not match raise a :class:`ValueError`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_odem.arguments import shown


def check_weights(weights: Sequence[float] | Tensor) -> None:
    """Check the utility weights of a stream.

    Args:
        weights: One weight per task, shape [K].

    Raises:
        ValueError: If a weight is negative, infinite or NaN (the message names it and its index), if no weight is
            positive, or if ``weights`` is not 1-dimensional.

    Example:
        >>> check_weights([1.0, 0.0, 2.5])
        >>> check_weights([1.0, -2.0])
        Traceback (most recent call last):
        ...
        ValueError: Utility weight -2.0 at index 1 is invalid: weights must be finite and not negative.
    """
    try:
        weights = torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"Utility weights must be numbers, one per task, got {shown(weights)}.") from error
    if weights.ndim != 1:
        raise ValueError(f"Utility weights must be 1-dimensional, one per task, got shape {tuple(weights.shape)}.")
    for index, weight in enumerate(weights.tolist()):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"Utility weight {weight} at index {index} is invalid: weights must be finite and not negative."
            )
    if not weights.any():
        raise ValueError(f"At least one utility weight must be positive, got {weights.tolist()}.")


def weighted_accuracy(accuracies: Tensor, weights: Tensor) -> Tensor:
    r"""Utility-weighted accuracy after a merge, eq. 2 of `ODE-M <https://arxiv.org/abs/2605.19409>`_.

    .. math:: \text{ACC}_w = \frac{\sum_{i=1}^{k} w_i \, a_{k,i}}{\sum_{i=1}^{k} w_i}

    Args:
        accuracies: Accuracy on each task after merge k, shape [k].
        weights: Utility weight of each task, shape [k].

    Raises:
        ValueError: If a weight is invalid, all weights are 0, or the shapes do not match.

    Example:
        >>> from torch import tensor
        >>> weighted_accuracy(tensor([0.5, 1.0]), weights=tensor([3.0, 1.0]))  # (3 * 0.5 + 1 * 1.0) / 4
        tensor(0.6250)
    """
    values, weights = _validate("accuracies", accuracies, weights)
    return weighted_mean(values, weights).to(accuracies.dtype)


def backward_transfer(matrix: Tensor, weights: Tensor, higher_is_better: bool = True) -> Tensor:
    r"""Utility-weighted backward transfer, eq. 3 of `ODE-M <https://arxiv.org/abs/2605.19409>`_.

    .. math:: \text{BWT}_w = \frac{\sum_{i<K} w_i \, (a_{K,i} - a_{i,i})}{\sum_{i<K} w_i}

    It measures the effect of later merges on earlier tasks. Each task is compared with its accuracy right after its own
    merge. The result is negative if accuracy was lost. The last task has no later merge and does not count.

    Args:
        matrix: Accuracy matrix, shape [K, K]. Entries above the diagonal are ignored.
        weights: Utility weight of each task, shape [K].
        higher_is_better: Whether higher scores are better.

    Returns:
        The mean; NaN for K < 2 and if all earlier tasks have weight 0.

    Raises:
        ValueError: If a weight is invalid, all weights are 0, or the shapes do not match.

    Example:
        >>> from torch import nan, tensor
        >>> matrix = tensor([[0.9, nan, nan], [0.8, 0.7, nan], [0.6, 0.8, 0.9]])
        >>> backward_transfer(matrix, weights=tensor([2.0, 1.0, 1.0]))  # (2 * -0.3 + 1 * 0.1) / 3
        tensor(-0.1667)
        >>> backward_transfer(tensor([[2.0, nan], [5.0, 1.0]]), tensor([1.0, 1.0]), higher_is_better=False)  # an error
        tensor(-3.)
    """
    values, weights = _validate("matrix", matrix, weights, ndim=2, sign=_sign(higher_is_better))
    return weighted_mean((values[-1] - values.diagonal())[:-1], weights[:-1]).to(matrix.dtype)


def forgetting(matrix: Tensor, weights: Tensor, higher_is_better: bool = True) -> Tensor:
    r"""Utility-weighted forgetting of `RWalk <https://arxiv.org/abs/1801.10112>`_ (Chaudhry et al., 2018).

    .. math:: \text{F}_w = \frac{\sum_{j<K} w_j \, \big(\max_{j \le l < K} a_{l,j} - a_{K,j}\big)}{\sum_{j<K} w_j}

    It measures the drop from the best accuracy that a task has had since it was merged to its accuracy now. Chaudhry et
    al. take the plain mean, which equal weights give.

    Args:
        matrix: Accuracy matrix, shape [K, K]. Entries above the diagonal are ignored.
        weights: Utility weight of each task, shape [K].
        higher_is_better: Whether higher scores are better.

    Returns:
        The mean; NaN for K < 2 and if all earlier tasks have weight 0.

    Raises:
        ValueError: If a weight is invalid, all weights are 0, or the shapes do not match.

    Example:
        >>> from torch import nan, tensor
        >>> matrix = tensor([[0.7, nan, nan], [0.9, 0.7, nan], [0.6, 0.8, 0.9]])
        >>> forgetting(matrix, weights=tensor([2.0, 1.0, 1.0]))  # (2 * (0.9 - 0.6) + 1 * (0.7 - 0.8)) / 3
        tensor(0.1667)
    """
    values, weights = _validate("matrix", matrix, weights, ndim=2, sign=_sign(higher_is_better))
    earlier = values[:-1, :-1]
    if not len(earlier):
        return matrix.new_tensor(math.nan)
    before_own_merge = torch.ones_like(earlier, dtype=torch.bool).triu(1)
    best = earlier.masked_fill(before_own_merge, -math.inf).amax(dim=0)
    return weighted_mean(best - values[-1, :-1], weights[:-1]).to(matrix.dtype)


def forward_transfer(
    before_training: Tensor, baseline: Tensor, weights: Tensor, higher_is_better: bool = True
) -> Tensor:
    r"""Utility-weighted forward transfer of `GEM <https://arxiv.org/abs/1706.08840>`_ (Lopez-Paz & Ranzato, 2017).

    .. math:: \text{FWT}_w = \frac{\sum_{i=2}^{K} w_i \, (a_{i-1,i} - b_i)}{\sum_{i=2}^{K} w_i}

    It measures the effect of other tasks' merges on a task that was not trained yet. Lopez-Paz & Ranzato take the
    accuracies of a randomly initialised model as :math:`b_i`; in model merging every task starts from the base model,
    so here :math:`b_i` is the accuracy of the pretrained base model.

    Args:
        before_training: Accuracy of the merged model on each task before that task was trained, :math:`a_{i-1,i}`,
            shape [K]. Element 0 is ignored: there was no merged model before the first task.
        baseline: Accuracy on each task of the base model, shape [K]. Element 0 is ignored.
        weights: Utility weight of each task, shape [K].
        higher_is_better: Whether higher scores are better.

    Returns:
        The mean; NaN for K < 2 and if all tasks but the first have weight 0.

    Raises:
        ValueError: If a weight is invalid, all weights are 0, or the shapes do not match.

    Example:
        >>> from torch import nan, tensor
        >>> before_training, baseline = tensor([nan, 0.4, 0.6]), tensor([0.1, 0.2, 0.7])
        >>> forward_transfer(before_training, baseline, weights=tensor([1.0, 3.0, 1.0]))  # (3 * 0.2 + 1 * -0.1) / 4
        tensor(0.1250)
    """
    values, _ = _validate("before_training", before_training, weights, sign=_sign(higher_is_better))
    baseline, weights = _validate("baseline", baseline, weights, sign=_sign(higher_is_better))
    return weighted_mean((values - baseline)[1:], weights[1:]).to(before_training.dtype)


def _sign(higher_is_better: bool) -> float:
    return 1.0 if higher_is_better else -1.0


def _validate(
    name: str, accuracies: Tensor, weights: Tensor, ndim: int = 1, sign: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Check the weights and the accuracies' shape; return both in fp64, the accuracies with the sign applied."""
    check_weights(weights)
    shape = ndim * (len(weights),)
    if accuracies.shape != shape or not accuracies.is_floating_point():
        raise ValueError(
            f"Expected `{name}` to be a floating point tensor of shape {shape} for {len(weights)} utility weights, "
            f"got {accuracies.dtype} of shape {tuple(accuracies.shape)}."
        )
    return sign * accuracies.double(), torch.as_tensor(weights, dtype=torch.float64, device=accuracies.device)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of the values [n] whose weight [n] is positive; NaN if there is none."""
    if not weights.any():
        return values.new_tensor(math.nan)
    weights = weights / weights.max()  # the plain sum of very large weights overflows
    return torch.where(weights > 0, weights * values, 0.0).sum() / weights.sum()

"""One number per stream, read from the accuracy matrix, as torchmetrics metrics."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_odem.metrics.counts import PredictionCounts
from lightning_odem.metrics.functional import backward_transfer, check_weights, forgetting, weighted_accuracy


class WeightedSummary(PredictionCounts):
    """Base of the metrics that are a weighted mean over the tasks merged so far.

    ``compute`` returns NaN while there is no task or every task so far has weight 0, so a stream may begin with a task
    of weight 0.

    Args:
        weights: Utility weight of each task of the stream, by task index; all equal if not given.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a weight is negative, infinite or NaN, or none is positive. From ``compute``, if there are fewer
            weights than tasks.
    """

    def __init__(self, weights: Sequence[float] | Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if weights is not None:
            check_weights(weights)
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64).tolist()

    def compute(self) -> Tensor:
        """Compute the weighted mean from the counts."""
        accuracy = self._accuracy()
        size = accuracy.shape[1]
        if self.weights is not None and len(self.weights) < size:
            raise ValueError(
                f"Got {len(self.weights)} utility weights for {size} tasks: give one per task of the stream."
            )
        weights = accuracy.new_tensor([1.0] * size if self.weights is None else self.weights[:size])
        return self._summarize(accuracy, weights) if weights.any() else accuracy.new_tensor(math.nan)

    def _summarize(self, accuracy: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Plot one value, or a list of values as a series.

        Args:
            val: Result of ``compute``, or a list of them, one per merge. If not given, ``compute`` is called.
            ax: Axes to draw into. If not given, a new figure is made.

        Returns:
            Figure (None if ``ax`` was given) and axes.
        """
        return self._plot(val, ax)


class WeightedAccuracy(WeightedSummary):
    r"""Compute the utility-weighted accuracy after the last merge, eq. 2 of `ODE-M <https://arxiv.org/abs/2605.19409>`_.

    .. math:: \text{ACC}_w = \frac{\sum_{i=1}^{K} w_i \, a_{K,i}}{\sum_{i=1}^{K} w_i}

    Where :math:`a_{K,i}` is the accuracy on task :math:`i` after the last merge :math:`K`, and :math:`w_i` the utility
    weight of that task.

    As input to ``update`` the metric accepts the following input:

    - ``preds`` (:class:`~torch.Tensor`): Scores of shape ``(B, C)`` or class ids of shape ``(B,)``
    - ``target`` (:class:`~torch.Tensor`): Class ids in an int tensor of shape ``(B,)``
    - ``merge`` (:class:`int`): Index of the merge after which the model predicts, from 0
    - ``task`` (:class:`int`): Index of the task of the batch, from 0 to ``merge``

    As output of ``compute`` the metric returns the following output:

    - ``acc_w`` (:class:`~torch.Tensor`): 0-dim tensor, fp64. NaN if a task of positive weight was not seen after the
      last merge, and as long as all tasks so far have weight 0.

    Args:
        weights: Utility weight of each task of the stream, by task index; all equal if not given.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a weight is negative, infinite or NaN, or none is positive. From ``update``, if the input is
            invalid. From ``compute``, if there are fewer weights than tasks.

    Example:
        >>> from torch import tensor
        >>> from lightning_odem.metrics import WeightedAccuracy
        >>> metric = WeightedAccuracy(weights=[3.0, 1.0])
        >>> metric.update(tensor([0, 1, 2, 2]), tensor([0, 1, 2, 3]), merge=0, task=0)  # 3 of 4 right
        >>> metric.update(tensor([0, 1, 0, 2]), tensor([0, 1, 2, 3]), merge=1, task=0)  # 2 of 4 right
        >>> metric.update(tensor([1, 0]), tensor([1, 0]), merge=1, task=1)  # both right
        >>> metric.compute()  # (3 * 0.5 + 1 * 1.0) / 4
        tensor(0.6250, dtype=torch.float64)
    """

    higher_is_better: bool = True
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    def _summarize(self, accuracy: Tensor, weights: Tensor) -> Tensor:
        return weighted_accuracy(accuracy[-1], weights)


class WeightedBackwardTransfer(WeightedSummary):
    r"""Compute the utility-weighted backward transfer, eq. 3 of `ODE-M <https://arxiv.org/abs/2605.19409>`_.

    .. math:: \text{BWT}_w = \frac{\sum_{i<K} w_i \, (a_{K,i} - a_{i,i})}{\sum_{i<K} w_i}

    Where :math:`a_{K,i}` is the accuracy on task :math:`i` after the last merge :math:`K`, :math:`a_{i,i}` the one
    right after its own merge, and :math:`w_i` the utility weight of that task.

    As input to ``update`` the metric accepts the following input:

    - ``preds`` (:class:`~torch.Tensor`): Scores of shape ``(B, C)`` or class ids of shape ``(B,)``
    - ``target`` (:class:`~torch.Tensor`): Class ids in an int tensor of shape ``(B,)``
    - ``merge`` (:class:`int`): Index of the merge after which the model predicts, from 0
    - ``task`` (:class:`int`): Index of the task of the batch, from 0 to ``merge``

    As output of ``compute`` the metric returns the following output:

    - ``bwt_w`` (:class:`~torch.Tensor`): 0-dim tensor, fp64, negative where accuracy was lost. NaN before the second
      merge, while all earlier tasks have weight 0, and if a required accuracy was not measured.

    Args:
        weights: Utility weight of each task of the stream, by task index; all equal if not given.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If a weight is negative, infinite or NaN, or none is positive. From ``update``, if the input is
            invalid. From ``compute``, if there are fewer weights than tasks.

    Example:
        >>> from torch import tensor
        >>> from lightning_odem.metrics import WeightedBackwardTransfer
        >>> metric = WeightedBackwardTransfer()
        >>> metric.update(tensor([0, 1, 2, 2]), tensor([0, 1, 2, 3]), merge=0, task=0)  # 3 of 4 right
        >>> metric.update(tensor([0, 1, 0, 2]), tensor([0, 1, 2, 3]), merge=1, task=0)  # 2 of 4 right
        >>> metric.update(tensor([1, 0]), tensor([1, 0]), merge=1, task=1)  # both right
        >>> metric.compute()  # 0.5 - 0.75
        tensor(-0.2500, dtype=torch.float64)
    """

    higher_is_better: bool = True
    plot_lower_bound: float = -1.0
    plot_upper_bound: float = 1.0

    def _summarize(self, accuracy: Tensor, weights: Tensor) -> Tensor:
        return backward_transfer(accuracy, weights)


class WeightedForgetting(WeightedSummary):
    r"""Compute the utility-weighted forgetting of `RWalk <https://arxiv.org/abs/1801.10112>`_ (Chaudhry et al., 2018).

    .. math:: \text{F}_w = \frac{\sum_{j<K} w_j \, \big(\max_{j \le l < K} a_{l,j} - a_{K,j}\big)}{\sum_{j<K} w_j}

    Where :math:`a_{l,j}` is the accuracy on task :math:`j` after merge :math:`l`, :math:`K` the last merge, and
    :math:`w_j` the task's utility weight.

    As input to ``update`` the metric accepts the following input:

    - ``preds`` (:class:`~torch.Tensor`): Scores of shape ``(B, C)`` or class ids of shape ``(B,)``
    - ``target`` (:class:`~torch.Tensor`): Class ids in an int tensor of shape ``(B,)``
    - ``merge`` (:class:`int`): Index of the merge after which the model predicts, from 0
    - ``task`` (:class:`int`): Index of the task of the batch, from 0 to ``merge``

    As output of ``compute`` the metric returns the following output:

    - ``forgetting_w`` (:class:`~torch.Tensor`): 0-dim tensor, fp64, positive where accuracy was lost. NaN before the
      second merge, while all earlier tasks have weight 0, and if an accuracy is missing.

    Args:
        weights: Utility weight of each task of the stream, by task index; all equal if not given.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: As :class:`WeightedSummary`; from ``update``, if the input is invalid.

    Example:
        >>> from torch import tensor
        >>> from lightning_odem.metrics import WeightedForgetting
        >>> metric, target = WeightedForgetting(weights=[2.0, 1.0, 1.0]), tensor([0, 1, 2, 3])
        >>> metric.update(tensor([0, 1, 0, 0]), target, merge=0, task=0)  # 2 of 4 right
        >>> metric.update(tensor([0, 1, 2, 3]), target, merge=1, task=0)  # 4 of 4 right
        >>> metric.update(tensor([0, 1, 2, 0]), target, merge=1, task=1)  # 3 of 4 right
        >>> metric.update(tensor([0, 0, 0, 0]), target, merge=2, task=0)  # 1 of 4 right
        >>> metric.update(tensor([0, 1, 2, 3]), target, merge=2, task=1)  # 4 of 4 right
        >>> metric.compute()  # (2 * (1.0 - 0.25) + 1 * (0.75 - 1.0)) / 3
        tensor(0.4167, dtype=torch.float64)
    """

    higher_is_better: bool = False
    plot_lower_bound: float = -1.0
    plot_upper_bound: float = 1.0

    def _summarize(self, accuracy: Tensor, weights: Tensor) -> Tensor:
        return forgetting(accuracy, weights)

"""The accuracy matrix of a stream as a torchmetrics metric."""

import functools
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from lightning_odem.metrics.counts import PredictionCounts


class AccuracyMatrix(PredictionCounts):
    r"""Compute the accuracy matrix of a stream of merges.

    .. math:: a_{k,i} = \frac{1}{N_i} \sum_{n=1}^{N_i} 1\big(\hat{y}_{k,n} = y_n\big)

    Where :math:`y_n` are the labels of the :math:`N_i` samples of task :math:`i`, and :math:`\hat{y}_{k,n}` the
    predictions of the merged model after merge :math:`k \ge i`.

    As input to ``update`` the metric accepts the following input:

    - ``preds`` (:class:`~torch.Tensor`): Scores of shape ``(B, C)`` or class ids of shape ``(B,)``
    - ``target`` (:class:`~torch.Tensor`): Class ids in an int tensor of shape ``(B,)``
    - ``merge`` (:class:`int`): Index of the merge after which the model predicts, from 0
    - ``task`` (:class:`int`): Index of the task of the batch, from 0 to ``merge``

    As output of ``compute`` the metric returns the following output:

    - ``accuracy_matrix`` (:class:`~torch.Tensor`): Tensor of shape ``(K, K)``, fp64, for ``K`` merges so far. Row k
      holds the accuracies after merge k as fractions in [0, 1], NaN where no sample was seen (and above the diagonal).

    Args:
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, if ``preds`` are neither scores nor class ids, contain NaN, or differ in length
            from ``target``; if ``target`` is not integer; if not 0 <= ``task`` <= ``merge``.

    Example:
        >>> from torch import tensor
        >>> from lightning_odem.metrics import AccuracyMatrix
        >>> metric = AccuracyMatrix()
        >>> metric.update(tensor([0, 1, 2, 2]), tensor([0, 1, 2, 3]), merge=0, task=0)  # 3 of 4 right
        >>> metric.update(tensor([0, 1, 0, 2]), tensor([0, 1, 2, 3]), merge=1, task=0)  # 2 of 4 right
        >>> metric.update(tensor([[0.2, 0.8], [0.9, 0.1]]), tensor([1, 0]), merge=1, task=1)  # both right
        >>> metric.compute()
        tensor([[0.7500,    nan],
                [0.5000, 1.0000]], dtype=torch.float64)
    """

    higher_is_better: bool = True

    def compute(self) -> Tensor:
        """Compute the accuracies from the counts."""
        return self._accuracy()

    def _wrap_compute(self, compute: Callable) -> Callable:
        # The base class squeezes results of one element; the matrix of the first merge stays [1, 1].
        squeezing = super()._wrap_compute(compute)
        return functools.wraps(compute)(lambda: torch.atleast_2d(squeezing()))

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure | SubFigure, Axes]:
        """Plot the matrix as a heat map in percent.

        Args:
            val: Result of ``compute``. If not given, ``compute`` is called.
            ax: Axes to draw into. If not given, a new figure is made.

        Returns:
            Figure and axes.
        """
        percent = 100 * (self.compute() if val is None else val).cpu()
        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        image = ax.imshow(percent.numpy(), vmin=0, vmax=100)
        for merge, task in (~percent.isnan()).nonzero().tolist():
            value = percent[merge, task].item()
            ax.text(task, merge, f"{value:.1f}", ha="center", va="center", color="black" if value > 60 else "white")
        ax.set(xlabel="task", ylabel="after merge", xticks=range(len(percent)), yticks=range(len(percent)))
        ax.figure.colorbar(image, ax=ax, label="accuracy [%]")
        return ax.figure, ax

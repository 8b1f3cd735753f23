"""The accuracy that measures tasks with classes unless they bring a metric of their own."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassAccuracy(Metric):
    """Compute the fraction of samples whose class is predicted, over all samples (``average="micro"``).

    As input to ``update`` the metric accepts the following input:

    - ``preds`` (:class:`~torch.Tensor`): Scores of shape ``(B, C)`` of two or more classes, or class ids of shape
      ``(B,)``
    - ``target`` (:class:`~torch.Tensor`): Class ids of shape ``(B,)``

    Class ids are integers or booleans. The number of classes need not be known.

    As output of ``compute`` the metric returns the following output:

    - ``accuracy`` (:class:`~torch.Tensor`): 0-dim tensor, fp64, in [0, 1]; NaN before the first sample.

    Args:
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: From ``update``, if ``preds`` or ``target`` are something else.

    Example:
        >>> from torch import tensor
        >>> metric = ClassAccuracy()
        >>> metric.update(tensor([0, 1, 2, 2]), tensor([0, 1, 2, 3]))
        >>> metric.update(tensor([[0.2, 0.8], [0.1, 0.9]]), tensor([1, 0]))
        >>> metric.compute()  # 4 of 6
        tensor(0.6667, dtype=torch.float64)
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    full_state_update: bool = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    EXPECTED = "scores [B, C] of 2 or more classes, or integer class ids [B], with integer targets [B]"

    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("correct", "total"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores of shape [B, C], or class ids of shape [B].
            target: Class ids of shape [B].
        """
        are_classes = (_are_scores(preds) or _are_ids(preds)) and _are_ids(target)
        if not are_classes or len(preds) != len(target):
            raise ValueError(f"Expected {self.EXPECTED}.")
        # Unsigned integers cannot be compared with others.
        classes = preds.argmax(1) if preds.dim() == 2 else preds.long()
        self.correct += (classes == target.long()).sum()
        self.total += len(target)

    def compute(self) -> Tensor:
        """Compute the fraction from the counts."""
        # On the CPU: not every device has fp64.
        return self.correct.cpu().double() / self.total.cpu()


def _are_scores(values: Any) -> bool:
    # A single column of scores does not choose between classes: its argmax is 0 whatever the score is.
    return isinstance(values, Tensor) and values.dim() == 2 and values.shape[1] > 1


def _are_ids(values: Any) -> bool:
    if not isinstance(values, Tensor) or values.dim() != 1:
        return False
    return not (values.is_floating_point() or values.is_complex())

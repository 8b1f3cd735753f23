"""Forward transfer as a torchmetrics metric."""

from torch import Tensor

from lightning_odem.metrics.functional import forward_transfer
from lightning_odem.metrics.summary import WeightedSummary


class WeightedForwardTransfer(WeightedSummary):
    r"""Compute the utility-weighted forward transfer of `GEM <https://arxiv.org/abs/1706.08840>`_.

    .. math:: \text{FWT}_w = \frac{\sum_{i=2}^{K} w_i \, (a_{i-1,i} - b_i)}{\sum_{i=2}^{K} w_i}

    Where :math:`a_{i-1,i}` is the accuracy on task :math:`i` of the merged model before that task was trained,
    :math:`b_i` that of the base model, and :math:`w_i` the task's utility weight. Lopez-Paz & Ranzato (2017) take a
    randomly initialised model for :math:`b_i`; in model merging every task starts from the base model.

    As input to ``update`` the metric accepts the following input:

    - ``preds`` (:class:`~torch.Tensor`): Scores of shape ``(B, C)`` or class ids of shape ``(B,)``
    - ``target`` (:class:`~torch.Tensor`): Class ids in an int tensor of shape ``(B,)``
    - ``merge`` (:class:`int`): -1 for the base model, ``task - 1`` for the merged model before the task was trained
    - ``task`` (:class:`int`): Index of the task of the batch, from 0

    As output of ``compute`` the metric returns the following output:

    - ``fwt_w`` (:class:`~torch.Tensor`): 0-dim tensor, fp64, over the tasks up to the last one on which a merged model
      was measured. NaN if there is none, all have weight 0, or an accuracy is missing.

    Args:
        weights: Utility weight of each task of the stream, by task index; all equal if not given. The weight of the
            first task does not enter.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: As :class:`WeightedSummary`; from ``update``, if the input is invalid.

    Example:
        >>> from torch import tensor
        >>> from lightning_odem.metrics import WeightedForwardTransfer
        >>> metric, target = WeightedForwardTransfer(), tensor([0, 1, 2, 3])
        >>> metric.update(tensor([0, 0, 0, 0]), target, merge=-1, task=1)  # base model: 1 of 4 right
        >>> metric.update(tensor([0, 1, 2, 0]), target, merge=0, task=1)  # merged model: 3 of 4 right
        >>> metric.compute()  # 0.75 - 0.25
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better: bool = True
    plot_lower_bound: float = -1.0
    plot_upper_bound: float = 1.0

    def update(self, preds: Tensor, target: Tensor, merge: int, task: int) -> None:
        """Count the predictions of the base model, or of the merged model before a task was trained, on that task.

        Args:
            preds: Scores of shape [B, C], C of 2 or more, or class ids of shape [B].
            target: Class ids of shape [B].
            merge: -1 for the base model, ``task - 1`` for the merged model before the task was trained.
            task: 0-based index of the task.

        Raises:
            ValueError: If ``preds`` or ``target`` cannot be counted, or ``merge`` is neither -1 nor ``task - 1``.
        """
        if task < 0 or merge not in (-1, task - 1):
            raise ValueError(
                f"Expected merge -1 (base model) or task - 1 (before the task was trained), "
                f"got merge {merge} and task {task}."
            )
        # Row 0 is the base model, row 1 the merged model.
        self._count(preds, target, cell=(int(merge >= 0), task), shape=(2, task + 1))

    def _accuracy(self) -> Tensor:
        measured = self.total[1:].sum(dim=0).nonzero().flatten().tolist()
        return super()._accuracy()[:, : max(measured, default=-1) + 1]

    def _summarize(self, accuracy: Tensor, weights: Tensor) -> Tensor:
        baseline, before_training = accuracy
        return forward_transfer(before_training, baseline, weights)

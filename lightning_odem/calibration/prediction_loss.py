"""Calibration losses that read a module's class scores and no label."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from lightning_odem.calibration import batches
from lightning_odem.calibration.loss import ModuleLoss, batches_on_device
from lightning_odem.calibration.objective import BatchLoss
from lightning_odem.calibration.prediction import predict
from lightning_odem.calibration.samples import MicroBatch


class ClassScores:
    """A module's class scores on micro-batches; labels are not read.

    Scores come from the module's ``prediction_step(batch, task)`` if it has one. Its targets are not used. Otherwise
    they are ``module(inputs)``, and a batch is the inputs, or a tuple or list that begins with them. Batches go to the
    device, and the module runs, as for :class:`~lightning_odem.calibration.loss.ModuleLoss`.

    Args:
        module: The module, attached to its Trainer.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self._module = module

    def scores(self, batch: MicroBatch) -> Tensor:
        """Scores [n, C] of the n samples, with a gradient if gradients are enabled.

        Raises:
            TypeError: If the module gives something else, or scores of a single class.
        """
        found, order = [], []
        for part, index in batches_on_device(self._module, batch):
            if isinstance(index, slice):
                return self._scores(part, batch.task, batches.count(batch.samples))
            found.append(self._scores(part, batch.task, len(index)))
            order.append(index)
        return torch.cat(found)[torch.cat(order).argsort().to(found[0].device)]

    def _scores(self, moved: Any, task: str, size: int) -> Tensor:
        module = self._module
        if getattr(module, "prediction_step", None) is None and isinstance(moved, (Tensor, tuple, list)):
            moved = (moved if isinstance(moved, Tensor) else moved[0], None)
        predicted = predict(module, moved, task)
        scores = predicted[0] if isinstance(predicted, (tuple, list)) else predicted
        found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        is_scores = isinstance(scores, Tensor) and scores.is_floating_point() and scores.dim() == 2
        if not is_scores or len(scores) != size or scores.shape[1] < 2:
            raise TypeError(
                f"Without labels the calibration loss needs class scores of {type(module).__name__}, floating point "
                f"[{size}, C] for {size} samples and C of 2 or more; on task {task!r} it gave {found}. A method "
                "prediction_step(batch, task) -> (scores, targets) decides what they are; loss='labels' needs none."
            )
        return scores


class LogitsLoss(ClassScores):
    r"""Mean over the samples of :math:`KL(softmax(z^*) \| softmax(z))`, with z the module's class scores.

    The task's fine-tuned model gave the logits :math:`z^*` when the task arrived. They are stored with the samples, as
    in dark experience replay (Buzzega et al., NeurIPS 2020), which compares them by squared distance. At the fine-tuned
    model, loss and gradient on its task are zero.
    """

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Mean loss of the batch, a scalar.

        Raises:
            TypeError: If the module gives no class scores.
            ValueError: If the samples have no logits, or logits of another number of classes.
        """
        if batch.logits is None:
            raise missing_logits([batch.task])
        scores = self.scores(batch)
        if scores.shape != batch.logits.shape:
            raise ValueError(
                f"On task {batch.task!r} {type(self._module).__name__} gives scores of {scores.shape[1]} classes, but "
                f"the model fine-tuned on the task gave {batch.logits.shape[1]}. A method prediction_step(batch, task) "
                "can use the head of the task it is told."
            )
        return kl_divergence(scores, batch.logits.to(scores.device))


class EntropyLoss(ClassScores):
    """Mean over the samples of the entropy of softmax(z), with z the module's class scores.

    AdaMerging minimises it on unlabelled test samples (Yang et al., ICLR 2024, arXiv:2310.02575). A model that is sure
    of wrong classes has a low entropy as well.

    Attributes:
        rewards_distance: Whether the loss falls with the length of a step, even of a useless one. Such a loss cannot
            tell how far to go.
    """

    rewards_distance = True

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Mean loss of the batch, a scalar.

        Raises:
            TypeError: If the module gives no class scores.
        """
        return entropy(self.scores(batch))


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    r"""Mean over the samples of :math:`KL(p^* \| p)`, with p* and p the softmax of ``reference`` and ``logits``.

    Its gradient in a sample's logits is :math:`(p - p^*) / n`: zero at the reference.

    Args:
        logits: Shape [n, C]; half precision is computed in fp32.
        reference: Shape [n, C].

    Returns:
        A scalar in nats.

    Example:
        >>> half, quarter = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log()
        >>> kl_divergence(quarter, half)  # log(2 / sqrt(3))
        tensor(0.1438)
    """
    return kl_div(_log_softmax(logits), _log_softmax(reference), reduction="batchmean", log_target=True)


def entropy(logits: Tensor) -> Tensor:
    """Mean over the samples of the entropy of softmax(``logits``), a scalar in nats.

    Args:
        logits: Shape [n, C]; half precision is computed in fp32.

    Example:
        >>> entropy(torch.zeros(5, 4))  # log 4
        tensor(1.3863)
    """
    log_p = _log_softmax(logits)
    return -(log_p.exp() * log_p).sum(1).mean()


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in fp32 or higher precision; a class masked by minus infinity has the lowest finite number."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)


LOSSES: dict[str, Callable[[L.LightningModule], BatchLoss]] = {
    "labels": ModuleLoss,
    "logits": LogitsLoss,
    "entropy": EntropyLoss,
}


def calibration_loss(module: L.LightningModule, kind: str) -> BatchLoss:
    """The calibration loss of a module.

    Args:
        module: The module, attached to its Trainer.
        kind: ``"labels"`` for the module's own loss, ``"logits"`` or ``"entropy"``.

    Raises:
        TypeError: If the module has no such loss, see :class:`~lightning_odem.calibration.loss.ModuleLoss`.
    """
    return LOSSES[kind](module)


def missing_logits(tasks: Sequence[str]) -> ValueError:
    """The error for tasks whose samples came into the buffer under another loss."""
    return ValueError(
        f"The calibration samples of {', '.join(tasks)} have no logits: these tasks were merged with another loss than "
        "'logits', and the models that could give them are gone. Continue this stream with loss='labels' or "
        "loss='entropy', or merge its tasks anew with loss='logits' from the first one on."
    )

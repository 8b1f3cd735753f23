"""Divergence and entropy of class distributions that are given by logits."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div


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
    """Log-probabilities in fp32 at least; those of classes masked by minus infinity are the lowest number there is."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)

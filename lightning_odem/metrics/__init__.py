"""Metrics of continual model merging: the accuracy matrix and the utility-weighted numbers read from it."""

from lightning_odem.metrics.accuracy_matrix import AccuracyMatrix
from lightning_odem.metrics.forward import WeightedForwardTransfer
from lightning_odem.metrics.functional import (
    backward_transfer,
    check_weights,
    forgetting,
    forward_transfer,
    weighted_accuracy,
)
from lightning_odem.metrics.summary import WeightedAccuracy, WeightedBackwardTransfer, WeightedForgetting

__all__ = [
    "AccuracyMatrix",
    "WeightedAccuracy",
    "WeightedBackwardTransfer",
    "WeightedForgetting",
    "WeightedForwardTransfer",
    "backward_transfer",
    "check_weights",
    "forgetting",
    "forward_transfer",
    "weighted_accuracy",
]

"""Metrics of continual model merging: the accuracy matrix and the utility-weighted numbers read from it."""

from lightning_odem.metrics.accuracy_matrix import AccuracyMatrix
from lightning_odem.metrics.class_accuracy import ClassAccuracy
from lightning_odem.metrics.forward import WeightedForwardTransfer
from lightning_odem.metrics.functional import (
    backward_transfer,
    check_weights,
    forgetting,
    forward_transfer,
    weighted_accuracy,
)
from lightning_odem.metrics.summary import WeightedAccuracy, WeightedBackwardTransfer, WeightedForgetting
from lightning_odem.metrics.task_metric import ACCURACY, TaskMetric, find_metric

__all__ = [
    "ACCURACY",
    "AccuracyMatrix",
    "ClassAccuracy",
    "TaskMetric",
    "WeightedAccuracy",
    "WeightedBackwardTransfer",
    "WeightedForgetting",
    "WeightedForwardTransfer",
    "backward_transfer",
    "check_weights",
    "find_metric",
    "forgetting",
    "forward_transfer",
    "weighted_accuracy",
]

"""Continual model merging as a PyTorch Lightning callback."""

from lightning_odem.calibration import CalibrationBuffer, CalibrationOptions
from lightning_odem.callback import ContinualMergeCallback
from lightning_odem.classifier import TaskClassifier
from lightning_odem.clip import ClipClassifier
from lightning_odem.methods import AverageMerge, MergeContext, MergeMethod, MergeResult, ODEMerge, PaperODEMerge
from lightning_odem.stream import TaskStream
from lightning_odem.tangent import Linearized
from lightning_odem.trainer import ContinualTrainer

__version__ = "0.5.0"

__all__ = [
    "AverageMerge",
    "CalibrationBuffer",
    "CalibrationOptions",
    "ClipClassifier",
    "ContinualMergeCallback",
    "ContinualTrainer",
    "Linearized",
    "MergeContext",
    "MergeMethod",
    "MergeResult",
    "ODEMerge",
    "PaperODEMerge",
    "TaskClassifier",
    "TaskStream",
]

"""Continual model merging as a PyTorch Lightning callback."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_odem import moved
from lightning_odem.calibration import CalibrationBuffer, CalibrationOptions
from lightning_odem.callback import ContinualMergeCallback
from lightning_odem.methods import AverageMerge, MergeContext, MergeMethod, MergeResult, ODEMerge, PaperODEMerge
from lightning_odem.stream import Stream
from lightning_odem.version import __version__

if TYPE_CHECKING:
    from lightning_odem.classifiers import ClipClassifier, Linearized, TaskClassifier
    from lightning_odem.studies.trainer import ContinualTrainer
    from lightning_odem.tasks import TaskStream

# Imported when they are first used: they bring torchvision, timm and scikit-learn, which the callback does not need.
_LATER = {
    "ClipClassifier": "lightning_odem.classifiers",
    "ContinualTrainer": "lightning_odem.studies.trainer",
    "Linearized": "lightning_odem.classifiers",
    "TaskClassifier": "lightning_odem.classifiers",
    "TaskStream": "lightning_odem.tasks",
}

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
    "Stream",
    "TaskClassifier",
    "TaskStream",
    "__version__",
]

moved.install()


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Ready LightningModules for streams of image classification tasks, and their parts."""

from lightning_odem.classifiers.classifier import TaskClassifier
from lightning_odem.classifiers.clip import ClipClassifier
from lightning_odem.classifiers.pixels import PixelClassifier
from lightning_odem.classifiers.probe import fit_linear_probe
from lightning_odem.classifiers.tangent import Linearized

__all__ = ["ClipClassifier", "Linearized", "PixelClassifier", "TaskClassifier", "fit_linear_probe"]

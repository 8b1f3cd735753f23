"""Tasks as LightningDataModules, and streams of them."""

from lightning_odem.stream.base import TaskStream
from lightning_odem.stream.catalogue import SUITE_8, SUITE_14, SUITE_20
from lightning_odem.stream.dataset import ArrayDataset
from lightning_odem.stream.digits import DigitsStream
from lightning_odem.stream.image_folder import ImageFolderStream
from lightning_odem.stream.npz import NpzStream
from lightning_odem.stream.splits import Splits
from lightning_odem.stream.task import Task
from lightning_odem.stream.torchvision_tasks import TorchvisionStream

__all__ = [
    "SUITE_8",
    "SUITE_14",
    "SUITE_20",
    "ArrayDataset",
    "DigitsStream",
    "ImageFolderStream",
    "NpzStream",
    "Splits",
    "Task",
    "TaskStream",
    "TorchvisionStream",
]

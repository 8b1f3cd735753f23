"""Tasks as LightningDataModules, and streams of them."""

from lightning_odem.tasks.base import TaskStream
from lightning_odem.tasks.catalogue import SUITE_8, SUITE_14, SUITE_20
from lightning_odem.tasks.dataset import ArrayDataset
from lightning_odem.tasks.digits import DigitsStream
from lightning_odem.tasks.image_folder import ImageFolderStream
from lightning_odem.tasks.npz import NpzStream
from lightning_odem.tasks.splits import Splits
from lightning_odem.tasks.task import Task
from lightning_odem.tasks.torchvision_tasks import TorchvisionStream

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

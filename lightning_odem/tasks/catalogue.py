"""What torchvision calls the datasets of the usual suites, and where it looks for them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torchvision import datasets

SUITE_8 = ["sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
"""The eight tasks of Ilharco et al. (2023)."""
SUITE_14 = [*SUITE_8, "oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100"]
"""The fourteen tasks of Wang et al. (2024)."""
SUITE_20 = [*SUITE_14, "cifar10", "food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered-sst2"]
"""The twenty tasks of Wang et al. (2024)."""


class Entry(NamedTuple):
    """One dataset.

    Args:
        dataset: Its class.
        num_classes: Number of classes.
        place: File or folder in ``root`` that must exist.
        train: Keywords for the training split.
        test: Keywords for the test split; None if there are no official splits.
        val: Keywords for the validation split; None if there is none.
        first_label: The smallest label.
        downloads: Whether torchvision can download it.
    """

    dataset: Callable[..., Any]
    num_classes: int
    place: str
    train: dict[str, Any]
    test: dict[str, Any] | None = None
    val: dict[str, Any] | None = None
    first_label: int = 0
    downloads: bool = True


class _SUN397(datasets.SUN397):
    """SUN397 in an order that does not depend on the file system, so splits of it do not depend on it either."""

    _image_files: list[Path]
    _labels: list[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        order = sorted(range(len(self._image_files)), key=self._image_files.__getitem__)
        self._image_files = [self._image_files[i] for i in order]
        self._labels = [self._labels[i] for i in order]


class _RESISC45(datasets.ImageFolder):
    """RESISC45 as its archive unpacks; torchvision has no class for it."""

    def __init__(self, root: Path) -> None:
        super().__init__(Path(root) / "NWPU-RESISC45")


_TRAIN, _TEST, _VAL = {"split": "train"}, {"split": "test"}, {"split": "val"}
_IS_TRAIN, _IS_TEST = {"train": True}, {"train": False}

CATALOGUE = {
    "sun397": Entry(_SUN397, 397, "SUN397", {}),
    "stanford-cars": Entry(datasets.StanfordCars, 196, "stanford_cars", _TRAIN, _TEST, downloads=False),
    "resisc45": Entry(_RESISC45, 45, "NWPU-RESISC45", {}, downloads=False),
    "eurosat": Entry(datasets.EuroSAT, 10, "eurosat/2750", {}),
    "svhn": Entry(datasets.SVHN, 10, "train_32x32.mat", _TRAIN, _TEST),
    "gtsrb": Entry(datasets.GTSRB, 43, "gtsrb", _TRAIN, _TEST),
    "mnist": Entry(datasets.MNIST, 10, "MNIST", _IS_TRAIN, _IS_TEST),
    "dtd": Entry(datasets.DTD, 47, "dtd/dtd", _TRAIN, _TEST, _VAL),
    "oxford_flowers102": Entry(datasets.Flowers102, 102, "flowers-102", _TRAIN, _TEST, _VAL),
    "pcam": Entry(datasets.PCAM, 2, "pcam", _TRAIN, _TEST, _VAL),
    "fer2013": Entry(datasets.FER2013, 7, "fer2013", _TRAIN, _TEST, downloads=False),
    "oxford-iiit-pet": Entry(datasets.OxfordIIITPet, 37, "oxford-iiit-pet", {"split": "trainval"}, _TEST),
    "stl10": Entry(datasets.STL10, 10, "stl10_binary", _TRAIN, _TEST),
    "cifar100": Entry(datasets.CIFAR100, 100, "cifar-100-python", _IS_TRAIN, _IS_TEST),
    "cifar10": Entry(datasets.CIFAR10, 10, "cifar-10-batches-py", _IS_TRAIN, _IS_TEST),
    "food101": Entry(datasets.Food101, 101, "food-101", _TRAIN, _TEST),
    "fashion_mnist": Entry(datasets.FashionMNIST, 10, "FashionMNIST", _IS_TRAIN, _IS_TEST),
    "emnist_letters": Entry(
        partial(datasets.EMNIST, split="letters"), 26, "EMNIST", _IS_TRAIN, _IS_TEST, first_label=1
    ),
    "kmnist": Entry(datasets.KMNIST, 10, "KMNIST", _IS_TRAIN, _IS_TEST),
    "rendered-sst2": Entry(datasets.RenderedSST2, 2, "rendered-sst2", _TRAIN, _TEST, _VAL),
}
"""The datasets of ``SUITE_20``."""


def labels_of(dataset: Any) -> npt.NDArray[np.int64]:
    """All labels of a torchvision dataset, int64 [N], without decoding an image."""
    if isinstance(dataset, datasets.PCAM):
        with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as file:
            return file["y"][:].reshape(-1).astype(np.int64)
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return np.asarray(getattr(dataset, attribute), dtype=np.int64)
    return np.array([label for _, label in dataset._samples], dtype=np.int64)

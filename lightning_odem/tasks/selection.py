"""Some samples of another dataset."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from lightning_odem.tasks.splits import hold_out


class Selection(Dataset[tuple[Tensor, int]]):
    """Some samples of a dataset, under given labels and through a transform.

    It cuts splits, shifts labels, turns PIL images into tensors and adds augmentation. Unlike with
    ``torch.utils.data.Subset``, ``targets`` stays correct.

    Args:
        dataset: Map-style dataset whose items start with the image.
        labels: One integer per sample of ``dataset``.
        indices: Samples to take; all by default.
        transform: Applied to each image when it is read; must return a uint8 tensor [C, H, W].

    Attributes:
        targets: The labels of the samples taken, int64.

    Raises:
        TypeError: When an image is read and the transform does not return a uint8 tensor.
    """

    def __init__(
        self,
        dataset: Any,
        labels: npt.ArrayLike,
        indices: Sequence[int] | npt.NDArray[np.int64] | None = None,
        transform: Callable | None = None,
    ) -> None:
        self.dataset = dataset
        self.labels = np.asarray(labels, dtype=np.int64)
        self.indices = np.arange(len(self.labels)) if indices is None else np.asarray(indices, dtype=np.int64)
        self.targets = self.labels[self.indices]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.dataset[int(self.indices[index])][0]
        if self.transform is not None:
            image = self.transform(image)
        if not isinstance(image, Tensor) or image.dtype != torch.uint8:
            found = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"Images must be uint8 tensors (models normalise them), but {self.transform} gave {found}.")
        return image, int(self.targets[index])

    def hold_out(self, fraction: float, seed: int) -> tuple["Selection", "Selection"]:
        """Split into the samples that stay and those held out; see :func:`~lightning_odem.tasks.splits.hold_out`."""
        stay, held = (
            Selection(self.dataset, self.labels, self.indices[part], self.transform)
            for part in hold_out(self.targets, fraction, seed)
        )
        return stay, held


def preprocessing(image_size: int | None, channels: int = 3) -> v2.Transform:
    """The fixed part of reading an image: conversion to a uint8 tensor [channels, image_size, image_size].

    Grey images are repeated, or colour images turned to grey. The shorter side is resized (bicubic, antialiased) and
    the centre is cropped, as in CLIP. ``image_size=None`` keeps the size.

    Example:
        >>> preprocessing(32)(torch.zeros(1, 28, 28, dtype=torch.uint8)).shape
        torch.Size([3, 32, 32])
    """
    steps = [v2.PILToTensor(), v2.RGB() if channels == 3 else v2.Grayscale()]
    if image_size is not None:
        steps += [v2.Resize(image_size, InterpolationMode.BICUBIC), v2.CenterCrop(image_size)]
    return v2.Compose(steps)

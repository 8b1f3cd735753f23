"""Images held in memory as one array."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset


class ArrayDataset(Dataset[tuple[Tensor, int]]):
    """A map-style dataset over an array of images and an array of labels.

    Args:
        images: uint8 [N, H, W] (grey) or [N, H, W, C].
        labels: Integers [N].
        transform: Applied to each image tensor [C, H, W] when it is read.

    Attributes:
        targets: The labels, int64 [N].

    Raises:
        TypeError: If the images are not uint8 or the labels are not integers.
        ValueError: If the ranks or the lengths do not fit.

    Example:
        >>> dataset = ArrayDataset(np.zeros((5, 8, 8), dtype=np.uint8), [0, 1, 2, 1, 0])
        >>> image, label = dataset[2]
        >>> image.shape, label
        (torch.Size([1, 8, 8]), 2)
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.ArrayLike,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        labels = np.asarray(labels)
        if images.dtype != np.uint8:
            raise TypeError(f"Images must be uint8, got {images.dtype}.")
        if images.ndim not in (3, 4):
            raise ValueError(f"Images must have shape [N, H, W] or [N, H, W, C], got {list(images.shape)}.")
        if labels.size and not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"Labels must be integers, got {labels.dtype}.")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images need labels of shape [{len(images)}], got {list(labels.shape)}.")
        self.images = images if images.ndim == 4 else images[..., None]
        self.targets = labels.astype(np.int64)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # A copy: the sample must not share memory with the array, nor inherit its strides or read-only flag.
        image = torch.from_numpy(self.images[index].transpose(2, 0, 1).copy())
        return image if self.transform is None else self.transform(image), int(self.targets[index])

"""Handwritten digits in several guises: a stream that needs no download."""

from functools import partial
from typing import Any

import numpy as np

from lightning_odem.arguments import LARGEST_IMAGE, check_choice, check_integer
from lightning_odem.tasks import shifts
from lightning_odem.tasks.base import TaskStream
from lightning_odem.tasks.dataset import ArrayDataset
from lightning_odem.tasks.selection import Selection
from lightning_odem.tasks.splits import Splits
from lightning_odem.tasks.task import Task

_SHIFTS = {
    shift.__name__: shift
    for shift in (
        shifts.rotated,
        shifts.inverted,
        shifts.slanted,
        shifts.striped,
        shifts.noisy,
        shifts.mirrored,
        shifts.occluded,
        shifts.shrunk,
        shifts.outlined,
        shifts.upright,
        shifts.centred,
        shifts.top,
        shifts.right,
        shifts.bottom,
        shifts.left,
    )
}


class DigitsStream(TaskStream):
    """The 1797 handwritten digits that come with scikit-learn, one domain shift per task.

    Each task has the same ten classes (domain-incremental learning) and the same images, 1294 for training, 144 for
    validation and 359 for test, in a form on which a net trained on the source task does worse; see
    :mod:`lightning_odem.tasks.shifts`. The images are split once by ``seed``, before they are shifted. So no form of a
    test image is in the training samples of any task, nor in those of ``pretraining``, the source task for
    pretraining a base model.

    Args:
        tasks: Any of rotated, inverted, slanted, striped, noisy (the default, in this order), mirrored, occluded,
            shrunk, outlined, upright, and, at a third of the size, centred, top, right, bottom and left.
        image_size: Height and width to which the 8x8 images are upscaled; batches are uint8 [B, 1, H, W].
        pretrained_on: The form of the digits in ``pretraining``.
        **kwargs: The other common arguments of :class:`~lightning_odem.tasks.TaskStream`.

    Example:
        >>> stream = DigitsStream(batch_size=32)
        >>> stream.names
        ['rotated', 'inverted', 'slanted', 'striped', 'noisy']
        >>> images, labels = next(iter(stream["noisy"].test_dataloader()))
        >>> images.shape, images.dtype, labels.dtype
        (torch.Size([32, 1, 32, 32]), torch.uint8, torch.int64)
    """

    def __init__(
        self, tasks: list[str] | None = None, image_size: int = 32, pretrained_on: str = "upright", **kwargs: Any
    ) -> None:
        image_size = check_integer("image_size", image_size, 0, LARGEST_IMAGE)
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, the size of the digits, got {image_size}.")
        check_choice("pretrained_on", pretrained_on, tuple(_SHIFTS))
        builders = {name: partial(_build, name, image_size) for name in _SHIFTS}
        super().__init__(builders, tasks=list(_SHIFTS)[:5] if tasks is None else tasks, **kwargs)
        self.pretraining = self._build(pretrained_on)


def _build(name: str, image_size: int, seed: int, **options: Any) -> Task:
    read = partial(_read, name, image_size, seed)
    return Task(name, num_classes=10, splits=read, source="scikit-learn's digits", seed=seed, **options)


def _read(name: str, image_size: int, seed: int) -> Splits:
    from sklearn.datasets import load_digits  # here, since it takes long to import

    digits = load_digits()
    images = shifts.resized((digits.images * 255 / 16).round().astype(np.uint8), image_size, image_size)
    everything = Selection(ArrayDataset(_SHIFTS[name](images), digits.target), digits.target)
    rest, test = everything.hold_out(0.2, seed)
    return Splits(*rest.hold_out(0.1, seed), test)

"""The three datasets of one task, and the rule that cuts a missing one out of another."""

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class LabelledDataset(Protocol):
    """A map-style dataset of ``(uint8 image [C, H, W], int label)`` with all labels in ``targets``.

    ``targets`` (list, array or tensor, as in torchvision) lets class-balanced subsets be drawn without decoding images.
    """

    @property
    def targets(self) -> Any:
        """One integer label per sample."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One image and its label."""


class Splits(NamedTuple):
    """Training, validation and test samples of one task, all without augmentation."""

    train: LabelledDataset
    val: LabelledDataset
    test: LabelledDataset


def hold_out(labels: npt.ArrayLike, fraction: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut a part out of a split, with the classes in proportion.

    The shuffled samples are sorted by class, and every ``1 / fraction``-th of them is held out. So each class gives its
    share to within one sample, however small the class is.

    Args:
        labels: Integer labels [N].
        fraction: Share to hold out, in (0, 1); at least one sample is taken.
        seed: Seed of the shuffle.

    Returns:
        Indices of the samples that stay and of those held out, both ascending.

    Example:
        >>> stay, held = hold_out([0, 0, 0, 0, 1, 1, 1, 1], fraction=0.25, seed=0)
        >>> len(stay), sorted(0 if index < 4 else 1 for index in held)
        (6, [0, 1])
    """
    labels = np.asarray(labels)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    count = min(len(labels), max(1, round(fraction * len(labels))))
    held = by_class[((np.arange(count) + 0.5) * len(labels) / max(count, 1)).astype(np.int64)]
    return np.setdiff1d(shuffled, held), np.sort(held)

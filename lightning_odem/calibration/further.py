"""Samples of a task beyond those that the calibration buffer keeps."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import default_collate

from lightning_odem.calibration import batches
from lightning_odem.calibration.samples import MicroBatch


class FurtherSamples:
    """Samples that a merge looks at once, drawn from their dataset at that time and never held together.

    Args:
        dataset: The task's map-style dataset.
        index: Which of its samples, [n].
        collate: Makes a batch of a list of samples.
        seed: Seed of what the dataset's transforms draw.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> further = FurtherSamples(TensorDataset(torch.arange(10)), torch.tensor([7, 3, 5]))
        >>> [(batch.samples[0].tolist(), batch.share) for batch in further.micro_batches("digits", 2)]
        [([7, 3], 0.6666666666666666), ([5], 0.3333333333333333)]
    """

    def __init__(
        self, dataset: Any, index: Tensor, collate: Callable[[list[Any]], Any] = default_collate, seed: int = 0
    ) -> None:
        self._dataset, self._index, self._collate, self._seed = dataset, index, collate, seed

    def __len__(self) -> int:
        return len(self._index)

    def micro_batches(self, task: str, size: int) -> Iterator[MicroBatch]:
        """The samples, always the same and in the same order, as micro-batches of a task; their shares sum to 1."""
        for number, index in enumerate(self._index.split(size) if len(self) else ()):
            with isolate_rng():
                seed_generators(self._seed + number)
                samples = self._collate([self._dataset[int(item)] for item in index])
            yield MicroBatch(batches.select(samples, slice(None)), task, len(index) / len(self), transferred=False)


def seed_generators(seed: int) -> None:
    """Seed all generators that a user's transforms may use."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the global one is meant)

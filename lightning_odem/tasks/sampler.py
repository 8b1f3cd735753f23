"""The order in which training samples are read."""

from collections.abc import Sized

import torch
from torch.utils.data import RandomSampler


class EpochSampler(RandomSampler):
    """A shuffle that depends only on the seed and the epoch.

    Lightning calls :meth:`set_epoch` before every epoch, so a run resumed between two epochs reads its samples in the
    order of the uninterrupted one. Without a Trainer the generator continues from epoch to epoch. Because this is a
    ``RandomSampler``, Lightning replaces it by a shuffling ``DistributedSampler`` if it needs one.

    Args:
        dataset: The training samples.
        seed: Seed of the generator; the global random state is neither read nor changed.

    Example:
        >>> sampler = EpochSampler(range(100), seed=0)
        >>> first, second = list(sampler), list(sampler)
        >>> sampler.set_epoch(0)
        >>> first == second, first == list(sampler)
        (False, True)
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        super().__init__(dataset, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Start the shuffle of an epoch (0-based)."""
        self.generator.manual_seed(self.seed + epoch)

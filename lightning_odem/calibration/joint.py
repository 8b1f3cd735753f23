"""Micro-batches of several tasks, for samples that count the same in the calibration loss."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_odem.calibration import batches
from lightning_odem.calibration.batches import Kept
from lightning_odem.calibration.samples import MicroBatch

# Samples of each task that tell a mean over samples from one over tokens, or over pairs of samples.
_TRIED = 8
# The label that torch's losses leave out of their means, which then are no means over samples.
_IGNORED = -100
# Relative difference of losses that is rounding in fp32. Half precision may round by more: then nothing is joined.
_ROUNDING = 1e-4


class JointSamples(Kept):
    """Samples of several tasks. They share the tasks' memory until a batch is made of them.

    Args:
        parts: The samples of each task, as tensors [n, ...] in containers of one structure.
        counts: Their numbers; by default they are counted.

    Attributes:
        parts: The samples of each task.
        counts: Their numbers.

    Example:
        >>> joint = JointSamples([(torch.zeros(2, 3), torch.zeros(2)), (torch.ones(1, 3), torch.ones(1))])
        >>> (batch, index), = joint.view(slice(1, 3)).batches()
        >>> batch[1], index
        (tensor([0., 1.]), tensor([0, 1]))
    """

    def __init__(self, parts: Sequence[Any], counts: Sequence[int] | None = None) -> None:
        self.parts = list(parts)
        self.counts = list(map(batches.count, parts)) if counts is None else list(counts)
        self._bounds = list(accumulate(self.counts, initial=0))

    def __len__(self) -> int:
        return self._bounds[-1]

    def select(self, index: Tensor | slice) -> "JointSamples":
        """The samples at ``index``, as a copy."""
        return JointSamples([batches.select(batches.concatenate(self.parts), index, device=None)])

    def view(self, index: slice) -> "JointSamples":
        """The samples of a range."""
        first, last, _ = index.indices(len(self))
        cuts = [(max(first - begin, 0), min(last, end) - begin) for begin, end in pairwise(self._bounds)]
        found = [
            (batches.view(part, slice(*cut)), cut[1] - cut[0])
            for part, cut in zip(self.parts, cuts, strict=True)
            if cut[0] < cut[1]
        ]
        return JointSamples([part for part, _ in found], [count for _, count in found])

    def labels(self) -> Tensor | None:
        """Class labels, int [n]; None if there are none."""
        return batches.labels(batches.concatenate(self.parts))

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """All samples in one batch with memory of its own."""
        yield batches.concatenate(self.parts), torch.arange(len(self))

    def state(self) -> dict[str, Any]:
        """Nothing: what is stored are the samples of each task."""
        raise TypeError("Joint samples are made for a pass and not stored; store those of each task.")


class Joining:
    """Lets tasks share micro-batches, if that gives each of them its share of the loss.

    Otherwise a gradient would take as many passes as there are tasks, however few samples they have. Samples share a
    micro-batch if they count the same in the loss, their tasks keep no parameters for themselves, and the loss is a
    mean over samples. Whether it is one is tried once, on some samples of each task, together and apart. Samples with
    labels that torch's losses ignore (-100) are never joined.

    Args:
        is_allowed: Whether the loss may get samples of several tasks.
        apart: Whether a task's samples have to stay by themselves.
    """

    def __init__(self, is_allowed: bool, apart: Callable[[str], bool]) -> None:
        # None: it has not been tried yet.
        self._is_mean: bool | None = None if is_allowed else False
        self._apart = apart

    def __call__(
        self, batches: Sequence[MicroBatch], size: int, losses: Callable[[Sequence[MicroBatch]], list[float]]
    ) -> Sequence[MicroBatch]:
        """The same samples in fewer micro-batches, if the loss allows it.

        Args:
            batches: The micro-batches.
            size: Samples per micro-batch at most.
            losses: Mean loss of each of some micro-batches, the same numbers in all processes.
        """
        if self._is_mean is False:
            return batches
        joined = join(batches, size, self._apart)
        if self._is_mean is None and len(joined) < len(batches):
            self._is_mean = _is_mean(losses, joined)
        return joined if self._is_mean else batches


def _is_mean(losses: Callable[[Sequence[MicroBatch]], list[float]], joined: Sequence[MicroBatch]) -> bool:
    """Whether the loss of several tasks' samples is the mean of their losses."""
    try:
        for together, apart in trials(joined):
            whole, *parts = losses([together, *apart])
            mean = math.fsum(loss * batch.share for loss, batch in zip(parts, apart, strict=True))
            if not math.isclose(whole, mean, rel_tol=_ROUNDING):
                return False
    except Exception:  # it may need more samples than are tried
        return False
    return True


def join(found: Sequence[MicroBatch], size: int, apart: Callable[[str], bool] = lambda task: False) -> list[MicroBatch]:
    """Cut micro-batches anew, so that samples of several tasks share one if they count the same in the loss.

    Samples can share a micro-batch if they have the same share of the loss and the same shapes and dtypes. The sum over
    all micro-batches of share times mean loss stays the same if losses are means over samples, see :func:`trials`.

    Args:
        found: The micro-batches.
        size: Samples per micro-batch at most.
        apart: Whether a task's samples have to stay by themselves.

    Returns:
        The micro-batches; those given if there would not be fewer of them.

    Example:
        >>> whole = [MicroBatch((torch.ones(2),), task, share=0.25, transferred=False) for task in "abcd"]
        >>> [(batch.task, len(batch.samples), batch.share) for batch in join(whole, size=4)]
        [('a, b', 4, 0.5), ('c, d', 4, 0.5)]
    """
    groups: dict[Hashable, list[MicroBatch]] = {}
    for number, batch in enumerate(found):
        groups.setdefault(number if apart(batch.task) else _kind(batch) or number, []).append(batch)
    joined = [batch for group in groups.values() for batch in _cut(group, size)]
    return joined if len(joined) < len(found) else list(found)


def trials(joined: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, list[MicroBatch]]]:
    """The first samples of all tasks of each joint micro-batch, together and apart.

    If a loss is a mean over samples, the first one's is the sum of share times loss of the others.
    """
    for batch in joined:
        if isinstance(batch.samples, JointSamples):
            first = [batches.view(part, slice(_TRIED)) for part in batch.samples.parts]
            whole = JointSamples(first)
            apart = [
                replace(batch, samples=part, share=count / len(whole))
                for part, count in zip(first, whole.counts, strict=True)
            ]
            yield replace(batch, samples=whole, share=1.0), apart


def _kind(batch: MicroBatch) -> Hashable:
    """What has to agree for samples to share a micro-batch; None if these cannot share one."""
    if isinstance(batch.samples, Kept) or batch.logits is not None:
        return None
    leaves, structure = tree_flatten(batch.samples)
    if any(bool((leaf == _IGNORED).any()) for leaf in leaves if leaf.dtype == torch.int64):  # that of labels
        return None
    share = f"{batch.share / len(leaves[0]):.12g}"  # equal shares may differ in their last bits
    return share, batch.transferred, str(structure), *((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in leaves)


def _cut(group: Sequence[MicroBatch], size: int) -> Iterator[MicroBatch]:
    """The samples of a group in their order, in micro-batches of ``size`` and a last one with the rest."""
    if len(group) == 1:
        yield group[0]
        return
    whole = JointSamples([batch.samples for batch in group])
    share = sum(batch.share for batch in group) / len(whole)
    tasks = [batch.task for batch, count in zip(group, whole.counts, strict=True) for _ in range(count)]
    for start in range(0, len(whole), size):
        samples = whole.view(slice(start, start + size))
        names = list(dict.fromkeys(tasks[start : start + size]))
        task = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        found: Any = samples.parts[0] if len(samples.parts) == 1 else samples
        yield replace(group[0], samples=found, task=task, share=share * len(samples))

"""Continual TIES-Merging: trim, elect a sign, merge what agrees with it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from lightning_odem.arguments import check_choice, check_range
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult, Summed
from lightning_odem.methods.needs import BaseModel
from lightning_odem.methods.task_arithmetic import Recursion
from lightning_odem.parameters.vector import is_finite

Combine = Literal["sum", "mean"]

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_BLOCK = 1 << 18  # entries that are looked at together, so that they stay in the cache


@dataclass(frozen=True)
class Difference:
    """The difference of two vectors [d] times a factor, of which only blocks are in memory."""

    model: Tensor
    base: Tensor
    factor: float

    def __len__(self) -> int:
        return len(self.model)

    def __getitem__(self, mask: Tensor) -> Tensor:
        return (self.model[mask] - self.base[mask]).mul_(self.factor)

    def split(self, size: int) -> Iterator[Tensor]:
        """The blocks, one after the other."""
        for model, base in zip(self.model.split(size), self.base.split(size), strict=True):
            yield (model - base).mul_(self.factor)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors lie."""
        return self.model.device


def at_once(compute: Callable[[], Tensor], wanted: bool = True) -> Tensor:
    """What is computed, of vectors that are whole."""
    return compute()


def thresholds(vectors: Sequence[Tensor | Difference], density: float, summed: Summed = at_once) -> list[Tensor]:
    """Find the magnitude of the smallest entry that :func:`trim` keeps, for each of some vectors of one dtype.

    The bits of positive numbers are ordered like the numbers. So the digits of the threshold to the base 2^16 are found
    one after the other, by counting how many entries have each.

    Args:
        vectors: The vectors, or parts of them.
        density: Fraction of entries to keep.
        summed: Sums over the parts, see :class:`~lightning_odem.methods.MergeContext`.

    Example:
        >>> thresholds([torch.tensor([3.0, -1.0, 2.0, -4.0])], 0.5)
        [tensor(3.)]
    """
    dtype = vectors[0].dtype
    found, ranks = [0] * len(vectors), [0] * len(vectors)
    for shift in range(torch.finfo(dtype).bits - 16, -1, -16):
        counts = summed(partial(_digits, vectors, shift, list(found)))
        for index, count in enumerate(counts):
            if not found[index] and not ranks[index]:
                ranks[index] = max(round(density * int(count.sum())), 1)
            larger = count.flip(0).cumsum(0)
            skipped = int((larger < ranks[index]).sum())
            ranks[index] -= int(larger[skipped - 1]) if skipped else 0
            found[index] = found[index] << 16 | (len(count) - 1 - skipped)
    return [torch.tensor(bits, dtype=_BITS[dtype], device=vectors[0].device).view(dtype) for bits in found]


def _digits(vectors: Sequence[Tensor | Difference], shift: int, known: Sequence[int]) -> Tensor:
    """How many entries of each vector have each digit, of those whose digits before are known; on the CPU, in fp64."""
    counts = torch.zeros(len(vectors), 1 << 16, dtype=torch.int64)
    for vector, count, above in zip(vectors, counts, known, strict=True):
        for piece in vector.split(_BLOCK):
            bits = piece.abs().view(_BITS[vector.dtype])
            digits = bits >> shift
            if shift + 16 < torch.finfo(vector.dtype).bits:
                digits = digits[bits >> (shift + 16) == above] & 0xFFFF
            count += torch.bincount(digits, minlength=1 << 16).cpu()
    return counts.double()


def trim(vector: Tensor, density: float) -> Tensor:
    """Keep the largest entries by magnitude, a fraction ``density`` of all (at least one), and zero the others.

    Entries as large as the smallest one kept are kept too.

    Example:
        >>> trim(torch.tensor([3.0, -1.0, 2.0, -4.0]), 0.5)
        tensor([ 3.,  0.,  0., -4.])
    """
    return _trim(vector, thresholds([vector], density)[0])


def _trim(vector: Tensor, threshold: Tensor) -> Tensor:
    # Much faster than a comparison, whose result is boolean; it keeps what is larger, not what is as large.
    return hardshrink(vector, float(torch.nextafter(threshold, torch.zeros_like(threshold) - 1)))


def elect_sign(vectors: Sequence[Tensor], majority: float | None = None) -> Tensor:
    """Return the sign of the sum of the vectors in each entry; where the sum is 0, the sign that most entries have.

    Args:
        vectors: The vectors, or parts of them.
        majority: Sum of the signs of all entries; by default that of these.

    Example:
        >>> elect_sign([torch.tensor([1.0, -1.0, 2.0]), torch.tensor([2.0, 1.0, -1.0])])
        tensor([1., 1., 1.])
    """
    sign = _sign(vectors)
    majority = float(sign.double().sum()) if majority is None else majority
    return sign.masked_fill_(sign == 0, (majority > 0) - (majority < 0))


def _sign(vectors: Sequence[Tensor]) -> Tensor:
    return sum(vectors[1:], start=vectors[0]).sign()


def disjoint_merge(vectors: Sequence[Tensor], sign: Tensor, combine: Combine = "sum") -> Tensor:
    """Return in each entry the sum, or mean, of the values that have the elected sign; 0 where none has it.

    Example:
        >>> vectors = [torch.tensor([1.0, -1.0, 2.0]), torch.tensor([2.0, 1.0, -1.0])]
        >>> disjoint_merge(vectors, torch.ones(3)), disjoint_merge(vectors, torch.ones(3), "mean")
        (tensor([3., 1., 2.]), tensor([1.5000, 1.0000, 2.0000]))
    """
    total, count = torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0])
    for vector in vectors:
        agreeing = (vector * sign).relu_()
        total.addcmul_(agreeing, sign)
        if combine == "mean":
            count += agreeing.sign_()
    return total if combine == "sum" else total.div_(count.clamp_(min=1))


def ties(
    vectors: Sequence[Tensor | Difference],
    density: float = 0.2,
    combine: Combine = "sum",
    summed: Summed = at_once,
) -> Tensor:
    """The TIES operator on task vectors of shape [d] (Yadav et al., NeurIPS 2023): trim, elect sign, disjoint merge.

    ``summed`` is that of :class:`~lightning_odem.methods.MergeContext`.
    """
    least = thresholds(vectors, density, summed)
    signs: list[float] = []
    merged = torch.empty(len(vectors[0]), dtype=vectors[0].dtype, device=vectors[0].device)
    for out, *parts in zip(*(each.split(_BLOCK) for each in (merged, *vectors)), strict=True):
        trimmed = [_trim(part, threshold) for part, threshold in zip(parts, least, strict=True)]
        sign = _sign(trimmed)
        signs.append(float(sign.sum()))
        out.copy_(disjoint_merge(trimmed, sign, combine))
        # Where entries cancel, the majority of all others decides. They are few, so most parts do not wait for it.
        rest = sum((part.abs() for part in trimmed[1:]), start=trimmed[0].abs()).mul_(1 - sign.abs())
        if rest.sum():
            out[rest != 0] = math.nan
    cancel = not is_finite(merged)
    majority = float(summed(lambda: torch.tensor(math.fsum(signs), dtype=torch.float64), cancel))
    if cancel:
        cancelled = merged.isnan()
        trimmed = [_trim(vector[cancelled], threshold) for vector, threshold in zip(vectors, least, strict=True)]
        merged[cancelled] = disjoint_merge(trimmed, elect_sign(trimmed, majority), combine)
    return merged


class TiesMerge(MergeMethod):
    r"""Continual TIES-Merging, in the two recursions found in the literature.

    With task vectors :math:`\tau_k = \psi_k - \psi_0`, accumulated update :math:`\Delta_k = \Psi_k - \psi_0`, scale
    :math:`\lambda` and operating time t:

    - ``"utility"``, eq. 51-53 of the ODE-M paper:
      :math:`\Delta_k = \lambda\, \mathrm{TIES}(\{(1 - t) \Delta_{k-1}, t \tau_k\})` from :math:`\Delta_1 = \tau_1`, the
      first model itself (eq. 1). A scale below 1 shrinks the older tasks once more with every merge.
    - ``"sum"``, FusionBench (behind the published tables):
      :math:`\Delta_k = \Delta_{k-1} + \lambda\, \mathrm{TIES}(\{\Delta_{k-1}, \tau_k\})` from
      :math:`\Delta_1 = \lambda \tau_1`, not trimmed. What was merged before is counted twice, so entries that survive
      the trimming grow like :math:`(1 + \lambda)^k`. Utility weights have no effect.

    In both, a task of weight 0 leaves the merged model untouched, and the order of the tasks matters. Vectors are
    trimmed as a whole, not tensor by tensor, so scaling one does not change which of its entries survive.

    Args:
        scale: Scaling coefficient, above 0. The published runs use 0.3 for 8 tasks and 0.1 for 14 and 20 (the released
            configuration file says 0.5).
        density: Fraction of entries that trimming keeps, in (0, 1]; 0.2 is the published one. The released code keeps
            one entry more.
        combine: ``"sum"`` (published) or ``"mean"`` of the entries that agree.
        recursion: ``"utility"`` or ``"sum"``.

    Raises:
        ValueError: For numbers out of range or unknown choices.

    Example:
        >>> context = MergeContext(["w"], [(4,)], {BaseModel: torch.zeros(4)})
        >>> merged, incoming = torch.tensor([4.0, -2.0, 1.0, 0.0]), torch.tensor([-2.0, -6.0, 0.0, 1.0])
        >>> TiesMerge(scale=1.0, density=0.5).merge(merged, incoming, 0.5, context).theta
        tensor([ 2., -4.,  0.,  0.])
    """

    needs = (BaseModel(),)
    sharded = True
    by_tensor = "sums"

    def __init__(
        self, scale: float = 0.3, density: float = 0.2, combine: Combine = "sum", recursion: Recursion = "utility"
    ) -> None:
        self.scale = check_range("scale", scale, 0, open_low=True)
        self.density = check_range("density", density, 0, 1, open_low=True)
        self.combine: Combine = check_choice("combine", combine, get_args(Combine))
        self.recursion = check_choice("recursion", recursion, get_args(Recursion))

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The first task's model; with ``recursion="sum"`` its task vector is scaled."""
        if self.recursion == "utility":
            return MergeResult(incoming)
        return MergeResult(torch.lerp(context[BaseModel], incoming, self.scale))

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Merge the accumulated update and the task vector."""
        if t == 0.0:
            return MergeResult(merged)
        base, utility = context[BaseModel], self.recursion == "utility"
        update, task_vector = (
            Difference(model, base, share if utility else 1.0) for model, share in ((merged, 1 - t), (incoming, t))
        )
        both = ties([update, task_vector], self.density, self.combine, context.summed)
        return MergeResult(torch.add(base if utility else merged, both, alpha=self.scale))

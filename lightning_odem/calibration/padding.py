"""How samples of different sizes become one tensor, and how that is read off from batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_odem.calibration.containers import CannotBeKeptError


@dataclass(frozen=True)
class Padding:
    """The value that makes samples of different sizes equally large.

    Args:
        value: The value that is filled in.
        at_start: Whether it stands before a sample; by default it stands behind.
        trim: Whether samples may hold more of it than their batch needs. The rest is cut off then.

    Example:
        >>> short, long = torch.tensor([[1, 2]]), torch.tensor([[1, 2, 3]])
        >>> torch.cat(Padding(0).fill([short, long]))
        tensor([[1, 2, 0],
                [1, 2, 3]])
    """

    value: bool | int | float
    at_start: bool = False
    trim: bool = False

    @classmethod
    def between(cls, batch: Tensor, samples: Sequence[Tensor], is_random: bool) -> "Padding":
        """The padding that makes a batch [n, ...] of its samples [1, ...].

        Args:
            batch: The batch.
            samples: Its samples.
            is_random: Whether the values of a sample differ from one collation to the next. They are not compared then.

        Raises:
            CannotBeKeptError: If the samples were not filled up with one value to the size of the largest.
        """
        largest = _largest(samples)
        for at_start in (False, True) if largest == list(batch.shape[1:]) else ():
            values, fits = set(), True
            for row, sample in zip(batch, samples, strict=True):
                inner = _inner(row.shape, sample.shape[1:], at_start)
                outside = torch.ones_like(row, dtype=torch.bool)
                outside[inner] = False
                values.update(row[outside].unique().tolist())
                fits = fits and (is_random or torch.equal(row[inner], sample[0]))
            if fits and len(values) == 1:
                return cls(values.pop(), at_start)
        raise CannotBeKeptError("samples of different shapes are not padded with one value to the largest of them")

    def fill(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """Samples [1, ...] in the size of the largest."""
        largest = _largest(samples)
        filled = []
        for sample in samples:
            whole = sample.new_full((1, *largest), self.value)
            whole[0][_inner(largest, sample.shape[1:], self.at_start)] = sample[0]
            filled.append(whole)
        return filled


def find_padding(entries: list[list[Tensor]]) -> list[Padding] | None:
    """The padding of each entry of a batch, found in samples [1, length, ...] of batches of different lengths.

    A sample ends or begins with padding. Its entries are padded at the same positions. The longest sample of each batch
    has none, so a value that all samples end with is not taken for padding.

    Args:
        entries: The samples of each entry. A sample has the same length in all of them.

    Returns:
        One padding per entry; None if there is none.
    """
    best: tuple[int, list[Padding] | None] = (0, None)
    for at_start in (False, True):
        excess: dict[tuple, int] = {}
        ending: dict[tuple, int] = {}
        for sample in zip(*entries, strict=True):
            flat = [(part.flip(1) if at_start else part)[0].reshape(part.shape[1], -1) for part in sample]
            if not flat[0].numel() or any(bool((part[-1] != part[-1, 0]).any()) for part in flat):
                continue
            repeated = torch.stack([(part == part[-1]).all(1) for part in flat]).all(0)
            value = tuple(part[-1, 0].item() for part in flat)
            run = int(repeated.flip(0).long().cumprod(0).sum())
            excess[value] = excess.get(value, 0) + run - 1
            ending[value] = ending.get(value, 0) + 1
        for value, score in excess.items():
            if score > best[0] and ending[value] < len(entries[0]):
                best = score, [Padding(part, at_start, trim=True) for part in value]
    return best[1]


def trim(entries: Sequence[Any], paddings: Sequence[Padding | None]) -> list[Any]:
    """The entries of a batch without padding that none of its samples needs.

    Args:
        entries: The entries; those with a padding are tensors [n, length, ...].
        paddings: The padding of each entry, None where nothing is to be cut off.
    """
    trimmed = list(entries)
    together: dict[tuple[int, bool], dict[int, Padding]] = {}
    for number, padding in enumerate(paddings):
        if padding is not None and padding.trim:
            together.setdefault((entries[number].shape[1], padding.at_start), {})[number] = padding
    for (length, at_start), found in together.items():
        empty = torch.ones(length, dtype=torch.bool)
        for number, padding in found.items():
            empty &= (entries[number] == padding.value).transpose(0, 1).reshape(length, -1).all(1)
        needed = (~empty).nonzero().flatten()
        if len(needed):
            span = slice(int(needed[0]), None) if at_start else slice(int(needed[-1]) + 1)
            for number in found:
                trimmed[number] = entries[number][:, span].contiguous()
    return trimmed


def _largest(samples: Sequence[Tensor]) -> list[int]:
    """The largest size of each dimension behind the first."""
    return [max(sample.shape[dim] for sample in samples) for dim in range(1, samples[0].dim())]


def _inner(shape: Sequence[int], own: Sequence[int], at_start: bool) -> tuple[slice, ...]:
    """Where a sample of shape ``own`` lies in a padded one."""
    pairs = zip(shape, own, strict=True)
    return tuple(slice(size - part, None) if at_start else slice(part) for size, part in pairs)

"""Samples as tensors [n, ...] in nested containers, or as :class:`Kept`, which makes such batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# Names of the label in a sample that is a mapping.
LABEL_KEYS = ("label", "labels", "target", "targets", "y")


class Kept(ABC):
    """Samples that are not plain tensors [n, ...]; batches are made of them when they are used."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def select(self, index: Tensor | slice) -> "Kept":
        """The samples at ``index``."""

    @abstractmethod
    def view(self, index: slice) -> "Kept":
        """The samples of a range."""

    @abstractmethod
    def labels(self) -> Tensor | None:
        """Class labels, int [n]; None if there are none."""

    @abstractmethod
    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """All samples in batches as the dataloader gives them, each with the indices of its samples."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The samples as tensors, numbers and strings in plain containers."""


def count(batch: Any) -> int:
    """Number of samples in a batch.

    Raises:
        TypeError: If the batch holds something other than tensors in tuples, lists and dictionaries. It can neither be
            cut into samples nor stored in a checkpoint.
        ValueError: If its tensors disagree on the number of samples.
    """
    if isinstance(batch, Kept):
        return len(batch)
    _check_containers(batch)
    leaves = tree_flatten(batch)[0]
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            raise TypeError(
                f"Calibration batches are tensors with one entry per sample, got {type(leaf).__name__} {leaf!r:.60}. "
                "Give the task a calibration_dataloader() whose batches hold what calibration_step needs."
            )
    sizes = {len(leaf) for leaf in leaves}
    if len(sizes) != 1:
        raise ValueError(f"The tensors of a calibration batch disagree on the number of samples: {sorted(sizes)}.")
    return sizes.pop()


def view(batch: Any, index: slice) -> Any:
    """The samples of a range; they share the batch's memory."""
    return batch.view(index) if isinstance(batch, Kept) else tree_map(lambda leaf: leaf[index], batch)


def copy(batch: Any) -> Any:
    """The batch with memory and containers of its own, as a dataloader would make it.

    Tensors are dense, and their dimensions keep their order in memory.
    """
    return apply_to_collection(batch, Tensor, torch.clone)


def each(batch: Any) -> Iterator[tuple[Any, slice | Tensor]]:
    """The samples as a dataloader gives them, in one batch or several, each with the indices of its samples.

    A batch shares neither memory nor containers with anything else. Its layout in memory does not depend on how the
    samples were cut.
    """
    if isinstance(batch, Kept):
        yield from batch.batches()
    else:
        yield copy(batch), slice(None)


def select(batch: Any, index: Tensor | slice, device: str | None = "cpu") -> Any:
    """The samples at ``index`` as a copy, in the batch's layout; on the CPU, or with None where they are."""
    if isinstance(batch, Kept):
        return batch.select(index)

    def copied(leaf: Tensor) -> Tensor:
        return _in_order_of(leaf, leaf[index].detach().to(device or leaf.device, copy=True))

    return tree_map(copied, batch)


def concatenate(batches: Sequence[Any]) -> Any:
    """Join batches of one structure; the result has the layout of the largest one.

    Raises:
        ValueError: If their structures or sample shapes differ.
    """
    flattened = [tree_flatten(batch) for batch in batches]
    structures = {str(structure) for _, structure in flattened}
    if len(structures) != 1:
        raise ValueError(f"Calibration batches differ in structure: {' and '.join(sorted(structures))}.")
    columns = zip(*(leaves for leaves, _ in flattened), strict=True)
    try:
        joined = [_in_order_of(max(column, key=len), torch.cat(column)) for column in columns]
    except RuntimeError as error:
        raise ValueError(f"Calibration samples differ in shape and cannot be kept together: {error}") from error
    return tree_unflatten(joined, flattened[0][1])


def labels(batch: Any) -> Tensor | None:
    """Class labels of a batch, int [n]: ``batch[1]``, or the first of ``LABEL_KEYS`` in a mapping; None without any."""
    if isinstance(batch, Kept):
        return batch.labels()
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and len(batch) > 1:
        found = batch[1]
    is_class = isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point()
    return found if is_class else None


def _in_order_of(pattern: Tensor, tensor: Tensor) -> Tensor:
    """A dense tensor with its dimensions in the order in memory that a copy of ``pattern`` has."""
    if pattern.is_contiguous():  # a single sample may be contiguous with any strides
        return tensor.contiguous()
    strides = torch.empty_like(pattern, device="meta").stride()
    order = sorted(range(pattern.dim()), key=lambda dim: -strides[dim])
    places = sorted(range(pattern.dim()), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(places)


def _check_containers(batch: Any) -> None:
    if isinstance(batch, dict):
        children: Sequence[Any] = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        children = batch
    else:
        return
    if type(batch) not in (dict, list, tuple):
        raise TypeError(
            f"Calibration batches are kept in checkpoints, which hold tensors in dict, list and tuple only; got a "
            f"{type(batch).__name__}. Give the task a calibration_dataloader() with plain containers."
        )
    for child in children:
        _check_containers(child)

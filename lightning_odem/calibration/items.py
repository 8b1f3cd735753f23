"""Items of a dataset, which are collated whenever they are used."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_odem.calibration.batches import Kept
from lightning_odem.calibration.containers import from_plain, put_together, to_plain
from lightning_odem.calibration.rows import label_of

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Items(Kept):
    """Items of a dataset, which the dataloader's collate function makes batches of whenever they are used.

    The function draws the same random numbers every time.

    Args:
        items: The items, taken apart.
        limit: The most items in one batch.
        collate: The collate function; a file cannot hold it, so a later process has to give it again.
    """

    items: tuple[Any, ...]
    limit: int
    collate: Collate | None = None

    def __len__(self) -> int:
        return len(self.items)

    def select(self, index: Tensor | slice) -> "Items":
        """The items at ``index``."""
        if isinstance(index, slice):
            return self.view(index)
        return replace(self, items=tuple(self.items[row] for row in index.tolist()))

    def view(self, index: slice) -> "Items":
        """The items of a range."""
        return replace(self, items=self.items[index])

    def labels(self) -> Tensor | None:
        """Class labels, by the rule of :func:`~lightning_odem.calibration.batches.labels`, if all are integers."""
        found = [label_of(item) for item in self.items]
        found = [label.item() if isinstance(label, Tensor) and label.dim() == 0 else label for label in found]
        return torch.tensor(found) if found and all(type(label) is int for label in found) else None

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Batches as the dataloader would make them, each with the indices of its samples.

        Raises:
            ValueError: If the collate function is unknown.
        """
        if self.collate is None:
            raise ValueError(
                "Calibration samples of an earlier process are collated by the training dataloader's collate_fn, "
                "which is not known here."
            )
        for index in torch.arange(len(self)).split(self.limit):
            with isolate_rng():
                torch.manual_seed(len(self))
                batch = self.collate([put_together(self.items[row]) for row in index.tolist()])
            yield batch, index

    def collated_by(self, collate: Collate | None) -> "Items":
        """The same items with this collate function, unless they have one."""
        return self if self.collate is not None else replace(self, collate=collate)

    def state(self) -> dict[str, Any]:
        """The items as a file can hold them."""
        return {"items": [to_plain(item) for item in self.items], "limit": self.limit}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Items":
        """The reverse of :meth:`state`."""
        return cls(tuple(map(from_plain, state["items"])), state["limit"])

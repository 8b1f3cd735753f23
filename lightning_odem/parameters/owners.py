"""Whole parameters, divided among the processes that share a model."""

from collections.abc import Container, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_odem.parameters.shards import Shards

Key = TypeVar("Key", bound=Hashable)


class Owners:
    """Gives each parameter of a sharded model to one process, which holds it whole for a while.

    Each process gets about as many entries as any other: its share of the model, or the largest parameter if that is
    more. Vectors of shards become vectors of whole parameters in one exchange between all processes, and back in
    another. No process ever holds a whole model. Values are copied, so none changes.

    A process in which something of a parameter is held already gets this parameter.

    Args:
        shards: How the processes share the parameters.
        names: Names of the parameters, in the order of the flat vectors.
        held: For each process, the names of the parameters of which it holds something.

    Attributes:
        mine: Names of the parameters of this process, in the order of the flat vectors.

    Example:
        >>> owners = Owners(shards, ["embedding", "weight", "bias"])  # doctest: +SKIP
        >>> theta = owners.collect(vector)  # shards of all parameters to some whole ones  # doctest: +SKIP
        >>> vector = owners.distribute(theta)  # doctest: +SKIP
    """

    def __init__(self, shards: Shards, names: Sequence[str], held: Sequence[Container[object]] = ()) -> None:
        self._shards, self._names = shards, names
        ranks = range(shards.size)
        takers = {name: [rank for rank, own in enumerate(held) if name in own] or [*ranks] for name in names}
        entries, owner = [0] * shards.size, {}
        # Who has no choice comes first, then the largest.
        for name in sorted(names, key=lambda name: (len(takers[name]), -shards.shapes[name].numel())):
            owner[name] = min(takers[name], key=entries.__getitem__)
            entries[owner[name]] += shards.shapes[name].numel()
        self._of = [[name for name in names if owner[name] == rank] for rank in ranks]
        self.mine = self._of[shards.rank]

    def collect(self, vector: Tensor) -> Tensor:
        """Exchange this process's shards of all parameters for the whole parameters that it owns.

        Args:
            vector: The shards, flat and one after the other.

        Returns:
            The whole parameters in the order of :attr:`mine`, flat and one after the other.
        """
        rank, size_of, ranks = self._shards.rank, self._shards.size_of, range(self._shards.size)
        here = _named(vector, [(name, size_of(name, rank)) for name in self._names])
        found = self._shards.exchange(
            _flat((here[name] for owned in self._of for name in owned), vector),
            [sum(size_of(name, rank) for name in owned) for owned in self._of],
            [sum(size_of(name, other) for name in self.mine) for other in ranks],
        )
        pieces = _named(found, [((name, other), size_of(name, other)) for other in ranks for name in self.mine])
        return _flat((pieces[name, other] for name in self.mine for other in ranks), vector)

    def distribute(self, vector: Tensor) -> Tensor:
        """Exchange the whole parameters that this process owns for its shards of all parameters."""
        rank, size_of, ranks = self._shards.rank, self._shards.size_of, range(self._shards.size)
        whole = _named(vector, [((name, other), size_of(name, other)) for name in self.mine for other in ranks])
        found = self._shards.exchange(
            _flat((whole[name, other] for other in ranks for name in self.mine), vector),
            [sum(size_of(name, other) for name in self.mine) for other in ranks],
            [sum(size_of(name, rank) for name in owned) for owned in self._of],
        )
        here = _named(found, [(name, size_of(name, rank)) for owned in self._of for name in owned])
        return _flat((here[name] for name in self._names), vector)


def _named(vector: Tensor, sizes: Sequence[tuple[Key, int]]) -> dict[Key, Tensor]:
    """The pieces of a flat vector by their keys."""
    return dict(zip((key for key, _ in sizes), vector.split([size for _, size in sizes]), strict=True))


def _flat(pieces: Iterable[Tensor], like: Tensor) -> Tensor:
    """Pieces one after the other; there may be none."""
    return torch.cat([like.new_empty(0), *pieces])

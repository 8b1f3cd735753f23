"""Folders of LoRA adapters as peft writes them, read as the updates that they are."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_odem.arguments import check_integer, check_range
from lightning_odem.parameters.adapter_config import FOLD, check_kind, check_same, module_of, rank_and_scale
from lightning_odem.parameters.low_rank import FactorPair, with_updates
from lightning_odem.parameters.model_folder import ADAPTER_CONFIG, ModelFolder

_FACTORS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


class AdapterFolders:
    """Adapters of one base model on disk, which are merged by their updates scale * B A.

    Ranks, scales and adapted modules may differ: an adapter changes a module that it does not adapt by zero. All else
    in the files (``modules_to_save``, biases) is a tensor like any other.

    Args:
        paths: The folders; the merged adapter gets the rank and the settings of the first.
        rank: Another rank for the merged adapter.
        energy: Choose the rank of each module: the smallest that holds this share of its update's squared norm.

    Attributes:
        first: Path of the first.
        rank_of: What the rank is that of, for messages.
        config: The configuration of the merged adapter; ranks chosen by energy are in it after :meth:`factors`.
        header: Metadata for the header of its file.

    Raises:
        ValueError: If adapters cannot be merged rightly; the message says what to do.
    """

    # What LoraFiles, which say their ranks themselves, do not set.
    _rank: int | None = None
    _energy: float | None = None

    def __init__(
        self, paths: Sequence[str | os.PathLike], rank: int | None = None, energy: float | None = None
    ) -> None:
        if rank is not None and energy is not None:
            raise ValueError(f"rank={rank} and energy={energy} both say how much is kept. Give one of them.")
        self._rank = None if rank is None else check_integer("rank", rank, 1)
        self._energy = None if energy is None else check_range("energy", energy, 0, 1, open_low=True)
        self.header: dict[str, str] = {}
        self._folders = {str(path): ModelFolder(path) for path in paths}
        configs = {path: folder.config(ADAPTER_CONFIG) for path, folder in self._folders.items()}
        (self.first, self.config), *others = configs.items()
        for path, config in configs.items():
            check_kind(path, config)
        for path, config in others:
            check_same(self.first, self.config, path, config)
        self.rank_of = self.first if rank is None and energy is None else "the merged adapter"
        self._pairs = {path: _pairs(path, configs[path], folder.read()) for path, folder in self._folders.items()}
        self._like: dict[str, Tensor] = {}
        for path, folder in self._folders.items():
            shapes = {name: tensor.to("meta") for name, tensor in folder.read().items()}
            updates = with_updates(shapes, self._pairs[path])
            self._like = {**{name: updates[name] for name in self._pairs[path]}, **self._like}
        self._merged = dict(self._pairs[self.first])
        if more := [name for name in self._like if name not in self._merged]:
            every = sorted({*self._merged, *more})
            self.config = {
                **self.config,
                "target_modules": [module_of(name) for name in every],
                **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
            }
            for path in self._pairs:
                for name in more:
                    if name in self._pairs[path] and name not in self._merged:
                        other = self._pairs[path][name].second
                        self._merged[name] = FactorPair(name, other, rank_and_scale(self.config, name)[1])

    def read(self, path: str | os.PathLike) -> dict[str, Tensor]:
        """The tensors of one adapter with the update of each pair, by the name of A, instead of its factors."""
        pairs = self._pairs[str(path)]
        updates = with_updates(self._folders[str(path)].read(), pairs)
        zeros = {name: torch.zeros(like.shape) for name, like in self._like.items() if name not in updates}
        biases = {bias: updates[bias] * pair.scale for pair in pairs.values() if (bias := _bias(pair)) in updates}
        return {**updates, **zeros, **biases}

    def no_update(self) -> dict[str, Tensor] | None:
        """The base model, as updates of zero; None if adapters also hold weights that the base model has its own of."""
        if any(self.read(path).keys() - self._like.keys() for path in self._folders):
            return None
        return {name: torch.zeros(like.shape) for name, like in self._like.items()}

    def factors(self, updates: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Tensors for the file of the merged adapter, and the share of the updates that its rank cannot hold."""
        own = self._folders[self.first].read()
        dtype = next(own[name].dtype for name in self._pairs[self.first])
        others = self._merged.keys() - own.keys()
        # What is excluded is the first adapter's: nothing, where it adapts no module.
        updates = {**{name: torch.zeros(self._like[name].shape) for name in others}, **updates}
        if self._rank or self._energy:
            self._choose_ranks(updates)
        kept, cut, whole = dict(updates), 0.0, 0.0
        for name, pair in self._merged.items():
            if name in updates:
                first, second = pair.factors(updates[name], self._rank_of(name))
                kept |= {pair.first: first.to(dtype), pair.second: second.to(dtype)}
                cut += float(torch.linalg.vector_norm(updates[name] - pair.product(first, second))) ** 2
                whole += float(torch.linalg.vector_norm(updates[name])) ** 2
            if (bias := _bias(pair)) in kept:
                kept[bias] = (kept[bias] / pair.scale).to(dtype)
        return kept, (cut / whole) ** 0.5 if whole else 0.0

    def _rank_of(self, name: str) -> int:
        """The rank that the merged update of a module gets."""
        return rank_and_scale(self.config, name)[0]

    def _choose_ranks(self, updates: Mapping[str, Tensor]) -> None:
        """Give the merged modules the ranks that were asked for; excluded ones stay as they are."""
        ranks = {name: rank_and_scale(self.config, name)[0] for name in self._merged}
        for name in self._merged.keys() & updates.keys():
            ranks[name] = self._rank or _rank_for(updates[name], self._energy or 1.0)
        most = max(ranks.values())
        pattern = {module_of(name): rank for name, rank in sorted(ranks.items()) if rank != most}
        self.config = {**self.config, "r": most, "rank_pattern": pattern}
        for name, pair in self._merged.items():
            self._merged[name] = FactorPair(name, pair.second, rank_and_scale(self.config, name)[1])


def is_adapter_folder(path: str | os.PathLike) -> bool:
    """Whether a path is the folder of an adapter."""
    return os.path.isfile(os.path.join(path, ADAPTER_CONFIG)) and ModelFolder(path).is_adapter


def _rank_for(update: Tensor, energy: float) -> int:
    """The smallest rank that holds a share of an update's squared norm."""
    squares = torch.linalg.svdvals(update.flatten(1).double()).square()
    shares = squares.cumsum(0) / squares.sum()
    return min(int((shares < energy - 1e-12).sum()) + 1, len(shares))


def _bias(pair: FactorPair) -> str:
    return f"{pair.second.removesuffix('.weight')}.bias"


def _pairs(path: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, FactorPair]:
    pairs = {}
    for name, first in tensors.items():
        part = next((part for part in name.split(".") if part.startswith("lora_")), "")
        if part not in _FACTORS:
            if part and part not in _FACTORS.values():
                raise ValueError(f"{name} in {path} is no factor of a LoRA update. {FOLD}")
            continue
        other = name.replace(f".{part}", f".{_FACTORS[part]}")
        second = tensors.get(other)
        if second is None:
            raise ValueError(f"{path} has {name}, but not {other}. The file is incomplete: save the adapter again.")
        rank, scale = rank_and_scale(config, name)
        fits = first.shape[0] == second.shape[1] == rank and second[0, 0].numel() == 1
        if not fits:
            raise ValueError(
                f"{name} {tuple(first.shape)} and {other} {tuple(second.shape)} in {path} are no factors of rank "
                f"{rank}, which its {ADAPTER_CONFIG} says. {FOLD}"
            )
        pairs[name] = FactorPair(name, other, scale)
    if not pairs:
        raise ValueError(f"{path} holds no LoRA factors. Give the folder that save_pretrained of peft wrote.")
    return pairs

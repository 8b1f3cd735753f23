"""Folders of LoRA adapters as peft writes them, read as the updates that they are."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_odem.parameters.low_rank import FactorPair, with_updates
from lightning_odem.parameters.model_folder import ADAPTER_CONFIG, ModelFolder

_FACTORS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
_ROOT = "base_model.model."
# What scale and factors of a file are made of; the updates say all of it.
_IN_THE_UPDATES = (
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
)
# Settings of the training, and notes.
_OF_THE_TRAINING = (
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "task_type",
)
_NO_PRODUCT = {
    "use_dora": "DoRA, whose weights are no sum of base and update",
    "use_qalora": "QA-LoRA, which pools the inputs",
    "use_bdlora": "block-diagonal factors",
    "target_parameters": "LoRA on parameters of several experts",
    "alora_invocation_tokens": "aLoRA, which works on some tokens only",
    "arrow_config": "a router between adapters",
    "kasa_config": "KaSA, whose update is no product of two matrices",
    "monteclora_config": "MonteCLoRA, whose factors are drawn at random",
    "velora_config": "VeLoRA",
}
_FOLD = (
    "Fold each adapter into its base (in peft: merge_and_unload(), then save_pretrained) and merge the whole models."
)


class AdapterFolders:
    """Adapters of one base model on disk, which are merged by their updates scale * B A.

    Ranks, scales and adapted modules may differ: an adapter changes a module that it does not adapt by zero. All else
    in the files (``modules_to_save``, biases) is a tensor like any other.

    Args:
        paths: The folders; the merged adapter gets the rank and the settings of the first.

    Attributes:
        first: Path of the first.
        config: The configuration of the merged adapter.

    Raises:
        ValueError: If adapters cannot be merged rightly; the message says what to do.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]) -> None:
        self._folders = {str(path): ModelFolder(path) for path in paths}
        configs = {path: folder.config(ADAPTER_CONFIG) for path, folder in self._folders.items()}
        (self.first, self.config), *others = configs.items()
        for path, config in configs.items():
            _check_kind(path, config)
        for path, config in others:
            _check_same(self.first, self.config, path, config)
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
                "target_modules": [_module(name) for name in every],
                **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
            }
            for path in self._pairs:
                for name in more:
                    if name in self._pairs[path] and name not in self._merged:
                        other = self._pairs[path][name].second
                        self._merged[name] = FactorPair(name, other, _rank_and_scale(self.config, name)[1])

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
        kept, cut, whole = dict(updates), 0.0, 0.0
        for name, pair in self._merged.items():
            if name in updates:
                rank = _rank_and_scale(self.config, name)[0]
                first, second = pair.factors(updates[name], rank)
                kept |= {pair.first: first.to(dtype), pair.second: second.to(dtype)}
                cut += float(torch.linalg.vector_norm(updates[name] - pair.product(first, second))) ** 2
                whole += float(torch.linalg.vector_norm(updates[name])) ** 2
            if (bias := _bias(pair)) in kept:
                kept[bias] = (kept[bias] / pair.scale).to(dtype)
        return kept, (cut / whole) ** 0.5 if whole else 0.0


def is_adapter_folder(path: str | os.PathLike) -> bool:
    """Whether a path is the folder of an adapter."""
    return os.path.isfile(os.path.join(path, ADAPTER_CONFIG)) and ModelFolder(path).is_adapter


def _module(name: str) -> str:
    """The module that a factor belongs to, as the configuration names it."""
    return name.removeprefix(_ROOT).rpartition(".lora_")[0]


def _bias(pair: FactorPair) -> str:
    return f"{pair.second.removesuffix('.weight')}.bias"


def _pairs(path: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, FactorPair]:
    pairs = {}
    for name, first in tensors.items():
        part = next((part for part in name.split(".") if part.startswith("lora_")), "")
        if part not in _FACTORS:
            if part and part not in _FACTORS.values():
                raise ValueError(f"{name} in {path} is no factor of a LoRA update. {_FOLD}")
            continue
        other = name.replace(f".{part}", f".{_FACTORS[part]}")
        second = tensors.get(other)
        if second is None:
            raise ValueError(f"{path} has {name}, but not {other}. The file is incomplete: save the adapter again.")
        rank, scale = _rank_and_scale(config, name)
        fits = first.shape[0] == second.shape[1] == rank and second[0, 0].numel() == 1
        if not fits:
            raise ValueError(
                f"{name} {tuple(first.shape)} and {other} {tuple(second.shape)} in {path} are no factors of rank "
                f"{rank}, which its {ADAPTER_CONFIG} says. {_FOLD}"
            )
        pairs[name] = FactorPair(name, other, scale)
    if not pairs:
        raise ValueError(f"{path} holds no LoRA factors. Give the folder that save_pretrained of peft wrote.")
    return pairs


def _rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and scale of a module's update, by peft's rules."""

    def setting(pattern: str, default: str) -> float:
        entries = config.get(pattern) or {}
        keys = (key for key in entries if re.match(rf"(.*\.)?({key})$", _module(name)))
        found = entries[key] if (key := next(keys, None)) is not None else config.get(default)
        if not isinstance(found, (int, float)) or found <= 0:
            raise ValueError(f"{ADAPTER_CONFIG} gives {name} the {default} {found!r}; a positive number is needed.")
        return found

    rank, alpha = int(setting("rank_pattern", "r")), setting("alpha_pattern", "lora_alpha")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_kind(path: str, config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(
            f"{path} is an adapter of type {kind}; only the updates of LORA are known to be products of two matrices. "
            f"{_FOLD}"
        )
    for setting, what in _NO_PRODUCT.items():
        if config.get(setting):
            raise ValueError(f"{path} has {setting} in its {ADAPTER_CONFIG}: {what}. {_FOLD}")


def _check_same(first: str, own: Mapping[str, Any], path: str, config: Mapping[str, Any]) -> None:
    base = "base_model_name_or_path"
    if own.get(base) != config.get(base):
        raise ValueError(
            f"{first} is an adapter of {own.get(base)!r}, {path} of {config.get(base)!r}. Updates of different base "
            f"models cannot be merged. If it is the same model under two names, write one of them as {base} into both "
            f"{ADAPTER_CONFIG}."
        )
    ignored = {*_IN_THE_UPDATES, *_OF_THE_TRAINING, base}
    differing = [
        f"{key} ({own.get(key)!r}, {config.get(key)!r})"
        for key in dict.fromkeys([*own, *config])
        if key not in ignored and _comparable(key, own.get(key)) != _comparable(key, config.get(key))
    ]
    if differing:
        raise ValueError(
            f"The {ADAPTER_CONFIG} of {first} and {path} differ in {', '.join(differing)}, so that the same numbers "
            f"mean different weights. {_FOLD}"
        )


def _comparable(key: str, value: Any) -> Any:
    if key == "init_lora_weights":
        # Some initialisations change the base weights under the adapter.
        return value if isinstance(value, str) and value.lower() not in ("gaussian", "eva", "orthogonal") else None
    if isinstance(value, list):
        return sorted(map(str, value))
    return value or None

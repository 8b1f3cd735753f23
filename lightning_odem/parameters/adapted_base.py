"""The base model of adapters, with their merged updates in its weights."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_odem.parameters.adapter_folders import AdapterFolders
from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.lora_files import LoraFiles
from lightning_odem.parameters.model_files import match_names
from lightning_odem.parameters.vector import canonical_name

_ROOT = "base_model.model."


class AdaptedBase:
    """Adds merged updates of adapters to the weights of their base model, and puts other tensors in their place.

    Args:
        base: The base model.
        adapters: The adapters that are merged.

    Raises:
        ValueError: If an update or a tensor has no place in the base model.
    """

    def __init__(self, base: str | os.PathLike, adapters: AdapterFolders) -> None:
        if isinstance(adapters, LoraFiles):
            raise ValueError(
                f"{adapters.first} is no adapter of peft, and it is not known which weights of {base} it is for. Merge "
                "without adapter_into, and fold the result with its own library (in diffusers: fuse_lora)."
            )
        if isinstance(start := adapters.config.get("init_lora_weights"), str) and start.lower() != "gaussian":
            raise ValueError(
                f"{adapters.first} was made with init_lora_weights={start!r}, which changes the base weights under the "
                "adapter. Fold it in peft (merge_and_unload)."
            )
        self._base, self._transposed = base, bool(adapters.config.get("fan_in_fan_out"))
        shapes = {name: tensor.to("meta") for name, tensor in adapters.read(adapters.first).items()}
        self._targets = {name: _target(name) for name in shapes}
        own = {canonical_name(name): tensor for name, tensor in read_checkpoint(base).items()}
        names = match_names(list(self._targets.values()), list(own))
        problems = []
        for name, target in self._targets.items():
            there = names[target]
            self._targets[name] = there
            shape = self._turned(name, shapes[name]).shape
            if there not in own:
                problems.append(f"{there} is not in it")
            elif own[there].shape != shape:
                problems.append(f"{there} has the shape {list(own[there].shape)}, the adapters' {list(shape)}")
        if problems:
            raise ValueError(
                f"{adapters.first} does not fit the base model {base}: {'; '.join(problems[:9])}. Give the model that "
                "the adapters were trained on, or fold them in peft (merge_and_unload)."
            )

    def state(self, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base model's tensors with merged updates, given by the names of the adapters' tensors."""
        state = {canonical_name(name): tensor for name, tensor in read_checkpoint(self._base).items()}
        for name, update in updates.items():
            there = self._targets[name]
            own = state[there]
            if ".lora_" in name:
                dtype = torch.promote_types(own.dtype, torch.float32)
                state[there] = (own.to(dtype) + self._turned(name, update).to(dtype)).to(own.dtype)
            else:
                state[there] = update.to(own.dtype)
        return state

    def _turned(self, name: str, update: Tensor) -> Tensor:
        """An update in the orientation of the weight."""
        is_embedding = ".lora_embedding_" in name
        return update.T if update.dim() == 2 and (is_embedding or self._transposed) and ".lora_" in name else update


def _target(name: str) -> str:
    """The tensor of the base model that one of an adapter's is for.

    Example:
        >>> _target("base_model.model.encoder.query.lora_A.weight"), _target("base_model.model.head.bias")
        ('encoder.query.weight', 'head.bias')
    """
    module, found, rest = name.removeprefix(_ROOT).partition(".lora_")
    return f"{module}.{'bias' if rest.endswith('.bias') else 'weight'}" if found else module

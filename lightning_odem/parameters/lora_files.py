"""Files of LoRA adapters that say the scale of their updates, as diffusers and kohya's scripts write them."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_odem.parameters.adapter_config import rank_and_scale
from lightning_odem.parameters.adapter_folders import AdapterFolders
from lightning_odem.parameters.low_rank import FactorPair, with_updates
from lightning_odem.parameters.weights_file import read_weights

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name of such a file in a folder of diffusers."""

_FACTOR = re.compile(r"(.*?)([._]lora(?:_linear_layer)?[._])(A|B|down|up)((?:\.\w+)?\.weight)")
_SECOND = {"A": "B", "down": "up"}
_SETTINGS = "lora_adapter_metadata"
# Without an alpha, the scale of these is 1; that of other files with lora_A and lora_B is not known.
_OF_DIFFUSERS = ("unet.", "transformer.", "transformer_2.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_NO_PRODUCT = re.compile(
    r"[._](dora_scale|magnitude_vector|lora_magnitude_vector|lora_mid|hada_\w+|lokr_\w+|oft_\w+)\b"
)
_HASHES = re.compile(r"sshs_|modelspec\.hash")
_WAY_OUT = "Fold each adapter into its base model with its own library and merge the whole models."


class LoraFiles(AdapterFolders):
    """LoRA adapters in files of diffusers or kohya's scripts, merged by their updates scale * B A.

    The scale is ``alpha / rank``, from the tensor ``alpha`` of a module or from the header that diffusers writes, and 1
    without either. The merged file has the rank, the alpha and the header of the first one. A module that the first
    does not adapt gets rank and alpha from the first file that adapts it.

    Args:
        paths: Files, or folders with ``pytorch_lora_weights.safetensors``.

    Raises:
        ValueError: If updates are no products of two matrices, or a factor lacks its partner.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]) -> None:
        files = {str(path): _LoraFile(path) for path in paths}
        self._folders = files  # type: ignore[assignment]
        self.first, self.config = str(paths[0]), {}
        self.rank_of = self.first
        self._pairs = {path: file.pairs for path, file in files.items()}
        self._like: dict[str, Tensor] = {}
        self._merged: dict[str, FactorPair] = {}
        self._ranks: dict[str, int] = {}
        self._alphas: dict[str, Tensor] = {}
        own = files[self.first]
        self.header = dict(own.header)
        for file in files.values():
            tensors = file.read()
            shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
            updates = with_updates(shapes, file.pairs)
            for name in [name for name in file.pairs if name not in self._merged]:
                self._like[name] = updates[name]
                self._ranks[name], scale = len(tensors[name]), file.pairs[name].scale
                if own.settings and file is not own:
                    component = _component(name, own.settings)
                    self._ranks[name], scale = rank_and_scale(_settings_of(own.settings, component), name)
                elif (alpha := _alpha(name)) in file.alphas:
                    self._alphas[alpha] = file.alphas[alpha]
                elif file.settings and file is not own:
                    # The first has no settings, so that the scale has to be in a tensor.
                    self._alphas[alpha] = torch.tensor(scale * self._ranks[name])
                self._merged[name] = FactorPair(name, file.pairs[name].second, scale)
        if own.settings and self._merged.keys() > own.pairs.keys():
            self.header[_SETTINGS] = json.dumps(_with_targets(own.settings, sorted(self._merged)))

    def factors(self, updates: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Tensors for the merged file, and the share of the updates that its rank cannot hold."""
        kept, cut = super().factors(updates)
        return {**kept, **self._alphas}, cut

    def _rank_of(self, name: str) -> int:
        return self._ranks[name]


class _Parts(NamedTuple):
    module: str
    between: str
    part: str
    rest: str


class _LoraFile:
    """The tensors of a file, its pairs of factors and what it says about their scale."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = _file(path)
        with safe_open(self.path, "pt") as file:
            self.header = {name: text for name, text in (file.metadata() or {}).items() if not _HASHES.match(name)}
        self.settings: dict[str, Any] = json.loads(self.header.get(_SETTINGS) or "{}")
        if found := [key for key, value in self.settings.items() if value and key.endswith(("use_dora", "lora_bias"))]:
            raise ValueError(f"{path} has {', '.join(found)} in its header, which is not merged here. {_WAY_OUT}")
        tensors = read_weights(self.path)
        if odd := [name for name in tensors if _NO_PRODUCT.search(name)]:
            raise ValueError(f"{path} has {odd[0]}: its updates are no products of two matrices. {_WAY_OUT}")
        self.pairs = {name: self._pair(name, tensors) for name in tensors if _parts(name).part in _SECOND}
        self.alphas = {name: tensors[name] for pair in self.pairs if (name := _alpha(pair)) in tensors}

    def read(self) -> dict[str, Tensor]:
        """The tensors without those that say a scale."""
        return {name: tensor for name, tensor in read_weights(self.path).items() if name not in self.alphas}

    def _pair(self, name: str, tensors: Mapping[str, Tensor]) -> FactorPair:
        module, between, part, rest = _parts(name)
        other = f"{module}{between}{_SECOND[part]}{rest}"
        first, second = tensors[name], tensors.get(other)
        if second is None:
            raise ValueError(f"{self.path} has {name}, but not {other}. The file is incomplete: save it again.")
        if len(first) != second.shape[1] or second[0, 0].numel() != 1:
            raise ValueError(
                f"{name} {tuple(first.shape)} and {other} {tuple(second.shape)} in {self.path} are no factors of a "
                f"product. {_WAY_OUT}"
            )
        if (alpha := tensors.get(_alpha(name))) is not None:
            scale = float(alpha) / len(first)
        elif self.settings:
            scale = rank_and_scale(_settings_of(self.settings, _component(name, self.settings)), name)[1]
        else:
            scale = 1.0
        if scale == 0:
            raise ValueError(f"{self.path} gives {name} the scale 0, so that it has no update. Leave it out.")
        return FactorPair(name, other, scale)


def is_lora_file(path: str | os.PathLike) -> bool:
    """Whether a path is a file, or a folder with one, whose factors have a known scale or are of no product.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     factors = {"q.lora_down.weight": torch.ones(1, 2), "q.lora_up.weight": torch.ones(2, 1)}
        ...     save_file(factors, f"{folder}/a.safetensors")
        ...     is_lora_file(f"{folder}/a.safetensors")
        True
    """
    file = _file(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as content:
            names, header = list(content.keys()), content.metadata() or {}
    except Exception:  # not a file of safetensors; whoever reads it says so
        return False
    factors = [name for name in names if _FACTOR.fullmatch(name) or _NO_PRODUCT.search(name)]
    says = _SETTINGS in header or any(_alpha(name) in names for name in factors)
    return bool(factors) and (
        says or any(_parts(name).part in ("down", "up", "") or name.startswith(_OF_DIFFUSERS) for name in factors)
    )


def _parts(name: str) -> _Parts:
    found = _FACTOR.fullmatch(name)
    return _Parts(*found.groups()) if found else _Parts(name, "", "", "")


def _file(path: str | os.PathLike) -> Path:
    return Path(path, LORA_FILE) if Path(path).is_dir() else Path(path)


def _alpha(name: str) -> str:
    return f"{_parts(name).module}.alpha"


def _component(name: str, settings: Mapping[str, Any]) -> str:
    """The part of a pipeline that a module belongs to, as the header names it."""
    head = name.partition(".")[0]
    return head if any(key.startswith(f"{head}.") for key in settings) else ""


def _settings_of(settings: Mapping[str, Any], component: str) -> dict[str, Any]:
    start = f"{component}." if component else ""
    return {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}


def _with_targets(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A header's settings that name all modules."""
    targets: dict[str, list[str]] = {}
    for name in names:
        component = _component(name, settings)
        start = f"{component}." if component else ""
        targets.setdefault(f"{start}target_modules", []).append(_parts(name).module.removeprefix(start))
    return {**settings, **targets}

"""Folders of models: which files hold weights, and which describe the model that has them."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from lightning_odem.parameters.sharded_folder import refuse_sharded_folder
from lightning_odem.parameters.weights_file import read_weights

FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_lora_weights.safetensors",
)
"""Files that may hold the weights in a folder; the first one found is read, as in transformers."""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_CONFIG = "adapter_config.json"
_MODULES = "modules.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf")
_INDEX = (".safetensors.index.json", ".bin.index.json", ".h5.index.json")
# Folders of the same weights for other runtimes, logs of the training, compiled code.
_ASIDE = ("onnx", "openvino", "runs", "__pycache__")


class ModelFolder:
    """A folder that a library of Hugging Face can load: transformers, sentence-transformers, peft, timm and others.

    A model of sentence-transformers has modules in sub-folders, listed in ``modules.json``. Their weights go by the
    name of the sub-folder and their own: ``2_Dense.linear.weight``.

    Args:
        path: The folder.

    Attributes:
        is_adapter: Whether it holds an adapter of peft, by itself.
        weights: Files of weights by the sub-folder of their module (the folder itself is the empty string); a file may
            be an index of shards.

    Raises:
        FileNotFoundError: If it holds no weights.
        ValueError: If it holds shards that can only be read by running code, a broken ``modules.json``, or weights
            that this does not list.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save_file({"weight": torch.ones(2)}, f"{path}/model.safetensors")
        ...     _ = Path(path, "config.json").write_text("{}")
        ...     folder = ModelFolder(path)
        ...     list(folder.read()), [str(file) for file in folder.others()]
        (['weight'], ['config.json'])
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.is_adapter = (self.path / ADAPTER_CONFIG).is_file() and _first(self.path, ADAPTER_FILES) is not None
        names = ADAPTER_FILES if self.is_adapter else FOLDER_FILES
        found = {place: _first(self.path / place, names if not place else FOLDER_FILES) for place in self._places()}
        self.weights = {place: file for place, file in found.items() if file is not None}
        if not self.weights:
            refuse_sharded_folder(self.path)
            raise FileNotFoundError(
                f"The folder {self.path} holds no weights: none of {', '.join(FOLDER_FILES)} is in it. Give the folder "
                "of a model as save_pretrained writes it, or a single file."
            )
        if (self.path / _MODULES).is_file() and (unlisted := self._unlisted()):
            raise ValueError(
                f"{self.path} holds weights in {', '.join(unlisted)}, which {_MODULES} does not list (a Router of "
                "sentence-transformers?). Merge these folders one by one and put the results in their places."
            )

    def _places(self) -> list[str]:
        """The folder itself, and the sub-folders of its modules."""
        listing = self.path / _MODULES
        if not listing.is_file():
            return [""]
        try:
            places = [str(module["path"]) for module in json.loads(listing.read_text(encoding="utf-8"))]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{listing} is no list of modules: {error!r}. Download it again.") from error
        # The list is untrusted and must not lead out of its folder.
        if outside := [place for place in places if place and (PurePosixPath(place).name != place or place == "..")]:
            raise ValueError(f"{listing} names modules outside its folder: {', '.join(outside)}.")
        return list(dict.fromkeys(["", *places]))

    def _unlisted(self) -> list[str]:
        """Sub-folders that hold weights and are no modules."""
        found = {file.relative_to(self.path) for here in self._walk() if (file := _first(here, FOLDER_FILES))}
        return sorted(str(file.parent) for file in found if file.parent.as_posix() not in (".", *self.weights))

    def _walk(self) -> Iterator[Path]:
        """The folder and those in it that belong to the model."""
        for directory, inner, _ in os.walk(self.path):
            inner[:] = sorted(
                name for name in inner if not name.startswith((".", "checkpoint-")) and name not in _ASIDE
            )
            yield Path(directory)

    def read(self, select: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
        """The tensors by name, on the CPU; no code is run. Do not write to them.

        Args:
            select: Selects tensors by name, so that not all files are opened; others may come along.
        """
        state: dict[str, Tensor] = {}
        for place, file in self.weights.items():
            prefix = f"{place}." if place else ""
            chosen = None if select is None else partial(_select_within, prefix, select)
            found = _read_shards(file, chosen) if file.suffix == ".json" else read_weights(file, chosen)
            state |= {f"{prefix}{name}": tensor for name, tensor in found.items()}
        return state

    def weight_files(self) -> list[Path]:
        """The files that hold the weights, with each shard instead of the index."""
        found = [_shards(file).values() if file.suffix == ".json" else [file.name] for file in self.weights.values()]
        return [
            file.parent / name
            for file, names in zip(self.weights.values(), found, strict=True)
            for name in sorted(set(names))
        ]

    def others(self) -> Iterator[Path]:
        """Files that are not weights, relative to the folder: configurations, tokenizers, code.

        Files of other formats of the same weights (ONNX, TensorFlow), checkpoints of a training, and hidden files are
        not among them.
        """
        for here in self._walk():
            for file in sorted(here.iterdir()):
                is_file = file.is_file()  # a link may lead nowhere
                if is_file and not file.name.startswith(".") and not file.name.lower().endswith((*_WEIGHTS, *_INDEX)):
                    yield file.relative_to(self.path)

    def config(self, name: str = "config.json") -> dict[str, Any]:
        """The content of a JSON file in the folder; empty if there is none.

        Raises:
            ValueError: If it is no JSON object.
        """
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}. Download it again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds {type(content).__name__}, not an object with settings. Download it again.")
        return content


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _select_within(prefix: str, select: Callable[[str], bool], name: str) -> bool:
    return select(f"{prefix}{name}")


def _shards(index: Path, select: Callable[[str], bool] | None = None) -> dict[str, str]:
    """The shard of each tensor."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: file for name, file in shards.items() if select is None or select(name)}
        # The index is untrusted and must not lead out of its folder.
        outside = [name for name in sorted(set(shards.values())) if Path(name).name != name]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}. Download it again.") from error
    if outside:
        raise ValueError(f"{index} names shards outside its folder: {', '.join(outside)}.")
    return shards


def _read_shards(index: Path, select: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    shards = _shards(index, select)
    state: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        state |= read_weights(index.parent / name, select)
    if absent := [name for name in shards if name not in state]:
        raise ValueError(f"{index} lists tensors that no shard has: {', '.join(absent)}. Download the folder again.")
    return state

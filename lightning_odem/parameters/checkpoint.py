"""Checkpoints of whole models on disk: files, and folders in the layout of Hugging Face."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_odem.parameters.sharded_folder import refuse_sharded_folder
from lightning_odem.parameters.weights_file import read_file, read_weights

FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that may hold the weights in a folder; the first one found is read, as in transformers."""

_HYPER_PARAMETERS = ("hparams_name", "hyper_parameters")


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, on the CPU; no code from it is run.

    Args:
        path: A ``.safetensors`` file; a torch file with a state dict, plain or under ``state_dict`` as in Lightning
            checkpoints; or a folder with one of ``FOLDER_FILES``, whole or in shards. Tensors are mapped into memory if
            the format allows it. Do not write to them.

    Raises:
        FileNotFoundError: If there is no such file or folder, or a shard is missing.
        ValueError: If the checkpoint is corrupt, needs code to be read or holds no named tensors. For a folder that
            DeepSpeed, FSDP or ModelParallelStrategy wrote in shards, the message has the command that converts it.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"weight": torch.ones(2)}, f"{folder}/model.safetensors")
        ...     read_checkpoint(folder)
        {'weight': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_dir():
        return read_weights(path)
    found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if not found:
        refuse_sharded_folder(path)
        raise FileNotFoundError(
            f"The folder {path} holds no weights: none of {', '.join(FOLDER_FILES)} is in it. Give the folder of a "
            "model as save_pretrained writes it, or a single file."
        )
    return _read_shards(found[0]) if found[0].suffix == ".json" else read_weights(found[0])


def read_hyper_parameters(path: str | os.PathLike) -> dict[str, Any]:
    """The entries of a Lightning checkpoint from which ``load_from_checkpoint`` makes its module; else empty."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return {}
    content = read_file(path)
    return {key: content[key] for key in _HYPER_PARAMETERS if key in content} if isinstance(content, Mapping) else {}


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shards.values()))
        # The index is untrusted and must not lead out of its folder.
        outside = [name for name in names if Path(name).name != name]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}. Download it again.") from error
    if outside:
        raise ValueError(f"{index} names shards outside its folder: {', '.join(outside)}.")
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_weights(index.parent / name)
    if absent := [name for name in shards if name not in state]:
        raise ValueError(f"{index} lists tensors that no shard has: {', '.join(absent)}. Download the folder again.")
    return state

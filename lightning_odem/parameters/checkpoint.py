"""Checkpoints of whole models on disk: files, and folders in the layout of Hugging Face."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_odem.parameters.model_folder import ModelFolder
from lightning_odem.parameters.weights_file import read_file, read_weights

_HYPER_PARAMETERS = ("hparams_name", "hyper_parameters")


def read_checkpoint(path: str | os.PathLike, select: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, on the CPU; no code from it is run.

    Args:
        path: A ``.safetensors`` file; a torch file with a state dict, plain or under ``state_dict`` as in Lightning
            checkpoints; or a folder, see :class:`~lightning_odem.parameters.model_folder.ModelFolder`, whole or in
            shards. Tensors are mapped into memory if the format allows it. Do not write to them.
        select: Selects tensors by name, so that not all of a large model are opened; others may come along.

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
    return ModelFolder(path).read(select) if path.is_dir() else read_weights(path, select)


def hash_checkpoint(path: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of each file of weights of a checkpoint, as ``sha256sum`` prints it, by the file's name in its folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.safetensors")
        ...     _ = file.write_bytes(b"weights")
        ...     {name: digest[:8] for name, digest in hash_checkpoint(folder).items()}
        {'model.safetensors': '9a129038'}
    """
    path = Path(path)
    files = ModelFolder(path).weight_files() if path.is_dir() else [path]
    digests = {}
    buffer = memoryview(bytearray(1 << 18))  # fits into the cache
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        sha = hashlib.sha256()
        with file.open("rb", buffering=0) as content:
            while size := content.readinto(buffer):
                sha.update(buffer[:size])
        digests[name] = sha.hexdigest()
    return digests


def read_hyper_parameters(path: str | os.PathLike) -> dict[str, Any]:
    """The entries of a Lightning checkpoint from which ``load_from_checkpoint`` makes its module; else empty."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return {}
    content = read_file(path)
    return {key: content[key] for key in _HYPER_PARAMETERS if key in content} if isinstance(content, Mapping) else {}

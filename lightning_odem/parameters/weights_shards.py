"""Weights of one model in several files, as transformers writes them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors|.+\.safetensors\.index\.json")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def divide(path: Path, tensors: Mapping[str, Tensor], most: int | None) -> dict[Path, dict[str, Tensor]]:
    """Divide tensors among files, and write the index that tells which file has which tensor.

    Args:
        path: The file that would hold all of them. If it does not have to be divided, there is no index.
        tensors: The tensors by name; values may be missing.
        most: Largest number of bytes of a file; None for one file. A tensor that is larger has a file of its own.

    Returns:
        The tensors of each file.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in tensors.items():
        if room is not None and most is not None:
            if tensor.nbytes > room and shards[-1]:
                shards.append({})
                room = most
            room -= tensor.nbytes
        shards[-1][name] = tensor
    if len(shards) == 1:
        return {path: shards[0]}
    names = [f"{path.stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {path.with_name(name): shard for name, shard in zip(names, shards, strict=True)}


def is_shard(path: Path) -> bool:
    """Whether a file has the name of a shard or of an index."""
    return _SHARD.fullmatch(path.name) is not None


def read_size(text: str | int) -> int:
    """A number of bytes as people write it, with the units of transformers.

    Raises:
        ValueError: If it is no positive size.

    Example:
        >>> read_size("5GB"), read_size("1.5 KiB"), read_size(300)
        (5000000000, 1536, 300)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", str(text), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS.get((found[2] or "").upper(), 1)) if found else 0
    if not size:
        raise ValueError(f"{text!r} is no size of a file; write it as 5GB, 500MB or 2GiB.")
    return size

"""Weights from a file, by name or into a module; no code in the file is run."""

import errno
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_odem.parameters.frozen_base import FROZEN, check_frozen_base, without_frozen

CLASSIFIERS = ("linear", "fc", "head", "heads", "classifier", "head.fc", "head_dist")
"""Names under which published image models keep the classifier of their pretraining task."""


def load_weights(module: nn.Module, path: str | os.PathLike) -> list[str]:
    """Load a file of weights into a module, completely or not at all.

    Accepts a ``.safetensors`` file, or a torch file that holds a state dict, either plain or under ``state_dict`` as in
    Lightning checkpoints. A leading name that all entries share and the module does not have (``model.``,
    ``backbone.``, ``module.``) is stripped. A classifier that came with the weights (see ``CLASSIFIERS``) is left out
    if the module has no parameters of that name. If BatchNorm's ``num_batches_tracked`` is missing, the module's own
    value stays. So does the frozen base of a model with adapters, which files of merged weights leave out.

    Args:
        module: Module that receives the weights, in its own dtypes and on its own device.
        path: The file. Only tensors and plain containers are read from it, and no code is run.

    Returns:
        The names, as in the file, of the classifier entries that were left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt, needs code to be read, holds no state dict, or does not fit the module. In
            the last case all missing and unexpected names and differing shapes are listed, and the module is unchanged.
            Also if the file leaves out a frozen base that is not the module's.

    Example:
        >>> import tempfile
        >>> source = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 10)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(source.state_dict(), f"{folder}/weights.pt")
        ...     load_weights(nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3)}), f"{folder}/weights.pt")
        ['fc.bias', 'fc.weight']
    """
    content = read_file(path)
    state = _state_dict_in(content, path)
    own = module.state_dict()
    names, ignored = _match(state, own)
    frozen = content.get(FROZEN, {})
    check_frozen_base(module, frozen)
    needed = without_frozen(module, own, frozen)
    missing = [name for name in needed if name not in names and not name.endswith("num_batches_tracked")]
    unexpected = [source for name, source in names.items() if name not in own]
    shapes = [
        f"{name} {list(state[source].shape)} in the file, {list(own[name].shape)} in the module"
        for name, source in names.items()
        if name in own and state[source].shape != own[name].shape
    ]
    problems = {"missing in the file": missing, "unknown to the module": unexpected, "differing in shape": shapes}
    if any(problems.values()):
        listing = "\n".join(f"  {kind}: {', '.join(found)}" for kind, found in problems.items() if found)
        raise ValueError(f"The weights in {path} do not fit {type(module).__name__}:\n{listing}")
    module.load_state_dict({name: state[source] for name, source in names.items()}, strict=False)
    return sorted(ignored)


def read_weights(path: str | os.PathLike, select: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The named tensors of a ``.safetensors`` file, a plain state dict or a Lightning checkpoint, on the CPU.

    Args:
        path: The file.
        select: Selects tensors of a ``.safetensors`` file by name; by default all are read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt, needs code to be read or holds no state dict.
    """
    if select is not None and Path(path).suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if select(name)}  # noqa: SIM118 (no mapping)
    return _state_dict_in(read_file(path), path)


def read_file(path: str | os.PathLike) -> Any:
    """The content of a ``.safetensors`` or torch file: tensors on the CPU and plain containers, nothing else.

    Tensors are mapped into memory if the format allows it, so only those that are used are read. Do not write to them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt or needs code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of weights at {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            found = path.stat()
            _check_archive(str(path.resolve()), found.st_mtime_ns, found.st_size)
        # Only the zip format can be mapped, which torch has used since 1.6.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} holds {code[1]}, which only running code from the file could rebuild; that is refused. "
                "Save the model's state_dict() instead, or convert it to .safetensors."
            ) from error
        raise ValueError(f"{path} is corrupt or not a file of weights: it cannot be unpickled safely.") from error
    except Exception as error:  # readers raise many types on unexpected bytes
        # Other errors of the system are not the file's; this one is of a place before its beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path} is corrupt or not a file of weights: {type(error).__name__} {error}") from error


@lru_cache
def _check_archive(path: str, changed: int, size: int) -> None:
    """Check a zip file's checksums, once for each time and size that it has.

    Nothing else would notice a changed byte in mapped tensors.
    """
    with zipfile.ZipFile(path) as archive:
        if (broken := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its entry {broken} is wrong")


def _state_dict_in(content: Any, path: str | os.PathLike) -> dict[str, Tensor]:
    """Find the state dict in a file's content: the content itself, or its entry ``state_dict``.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds {type(content).__name__} {content!r:.80}, not a state dict of named tensors.")
    others = [f"{name} ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path} is not a state dict: these entries are not tensors: {', '.join(others)}. Save the state dict by "
            "itself or under the key 'state_dict'."
        )
    return dict(content)


def _match(state: dict[str, Tensor], own: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Map the module's names to the file's names; also return the file's names that belong to a classifier."""
    extra = tuple(f"{name}." for name in CLASSIFIERS if not any(key.startswith(f"{name}.") for key in own))
    tops = {name.partition(".")[0] for name in own}
    names, ignored = {name: name for name in state}, []
    while True:
        ignored += [names.pop(name) for name in list(names) if name.startswith(extra)]
        shared = {name.partition(".")[0] for name in names}
        if len(shared) != 1 or shared & tops or not all("." in name for name in names):
            return names, ignored
        names = {name.partition(".")[2]: source for name, source in names.items()}

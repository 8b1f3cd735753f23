"""One safetensors file of a stream's state, checked by its size and its hash."""

import hashlib
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_odem.parameters.files import sync
from lightning_odem.stream.store.error import DamagedFileError


@dataclass(frozen=True)
class TensorFile:
    """A file that is written once and never changed.

    Args:
        name: Its name, ``<section>-<digits>.safetensors``, with the first 16 digits of the hash.
        size: Its size in bytes.
        sha256: SHA-256 of the whole file, hexadecimal.
    """

    name: str
    size: int
    sha256: str

    @classmethod
    def write(cls, tensors: Mapping[str, Tensor], section: str, draft: Path) -> "TensorFile":
        """Write a draft to the disk; the result has the name that the file is to get.

        Raises:
            OSError: If the draft cannot be written.
        """
        try:
            save_file(dict(tensors), draft)
        except SafetensorError as error:
            # The number is in the text only: "(os error 28)", or "Os { code: 28" in older versions of safetensors.
            found = re.search(r"(?:os error|code:) (\d+)", str(error))
            code = int(found[1]) if found else 0
            raise OSError(code, os.strerror(code) if found else str(error), str(draft)) from error
        # safetensors makes files that only their owner can read; give it the usual rights.
        draft.chmod(draft.parent.stat().st_mode & 0o666)
        sync(draft)
        digest = _sha256(draft)
        return cls(f"{section}-{digest[:16]}.safetensors", draft.stat().st_size, digest)

    def is_in(self, directory: Path) -> bool:
        """Whether the file is in a directory and has its full size; its content is not read."""
        path = directory / self.name
        return path.is_file() and path.stat().st_size == self.size

    def read(self, directory: Path, mapped: bool = False) -> dict[str, Tensor]:
        """The tensors, after a check of all bytes.

        Args:
            directory: The directory of the file.
            mapped: Whether to map the file into memory. Its pages are read when a tensor is used, and the system can
                drop them again. Writing into such a tensor does not change the file.

        Raises:
            DamagedFileError: If the file is missing or not what was written.
        """
        path = directory / self.name
        if not path.exists():
            raise DamagedFileError(f"{path} is missing.")
        if not path.is_file():
            raise DamagedFileError(f"{path} is no regular file.")
        if (size := path.stat().st_size) != self.size:
            raise DamagedFileError(f"{path} has {size} bytes where {self.size} were written.")
        if (digest := _sha256(path)) != self.sha256:
            raise DamagedFileError(
                f"{path} has changed since it was written: its SHA-256 is {digest[:16]}..., not {self.sha256[:16]}..."
            )
        try:
            tensors = load_file(path)
        except (SafetensorError, RuntimeError, KeyError) as error:
            raise DamagedFileError(f"{path} is no safetensors file that can be read: {error}") from error
        return tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}

    def describe(self, directory: Path, crc32: Mapping[str, int]) -> str:
        """What is known of the tensors of a damaged file: which are whole, by their checksums."""
        path = directory / self.name
        if not path.is_file():  # a pipe would be waited for
            return ""
        try:
            found = checksums(load_file(path))
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError):
            return ""
        if not crc32 or found.keys() != crc32.keys():
            return ""
        damaged = [name for name in crc32 if crc32[name] != found[name]]
        which = f"damaged are {', '.join(damaged[:5])}{', ...' if len(damaged) > 5 else ''}" if damaged else "all"
        return f" {len(crc32) - len(damaged)} of its {len(crc32)} tensors verify; {which}."


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of the bytes of each tensor, by name.

    Example:
        >>> import torch
        >>> checksums({"weight": torch.zeros(2), "bias": torch.zeros(0)})
        {'weight': 1696784233, 'bias': 0}
    """
    return {
        name: zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        for name, tensor in tensors.items()
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

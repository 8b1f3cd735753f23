"""A ``.safetensors`` file that is written tensor by tensor."""

import json
import math
import os
from collections.abc import Mapping
from types import TracebackType

import torch
from safetensors.torch import save
from torch import Tensor

_BLOCK = 1 << 19  # bytes that are read back together


class WeightsWriter:
    """Writes a ``.safetensors`` file whose tensors are not in memory together.

    Names, shapes and dtypes are known before, so the header is written first. Tensors may come in any order. Each is
    read back when it is written.

    Args:
        path: The file.
        like: A tensor per name with its shape and dtype; values do not matter and may be missing (device meta).
        metadata: Strings for the header.

    Raises:
        OSError: If a tensor does not come back as it was written; at the end, if the disk is full.
        ValueError: At the end, if tensors are missing.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with WeightsWriter(f"{folder}/a.safetensors", {"w": torch.empty(2, device="meta")}, {}) as writer:
        ...         writer.write({"w": torch.ones(2)})
        ...     load_file(f"{folder}/a.safetensors")
        {'w': tensor([1., 1.])}
    """

    def __init__(self, path: str | os.PathLike, like: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._path = path
        # The library names dtypes, and orders tensors so that all are aligned.
        empty = save({name: torch.empty(0, dtype=each.dtype) for name, each in like.items()}, dict(metadata))
        size = int.from_bytes(empty[:8], "little")
        header = json.loads(empty[8 : 8 + size])
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = end, end + math.prod(like[name].shape) * like[name].dtype.itemsize
                entry.update(shape=list(like[name].shape), data_offsets=[begin, end])
                self._places[name] = begin, end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = dict.fromkeys(self._places)
        self._dtypes = {name: each.dtype for name, each in like.items()}
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed on exit)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the file."""
        return list(self._places)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that lie on the CPU, and compare what can be read with them."""
        for name, tensor in tensors.items():
            begin, end = self._places[name]
            content = tensor.detach().contiguous().flatten().view(torch.uint8)
            if len(content) != end - begin or tensor.dtype != self._dtypes[name]:
                raise ValueError(f"{name} comes as {tuple(tensor.shape)}, {tensor.dtype}; another was announced.")
            self._put(self._start + begin, content)
            if not self._holds(self._start + begin, content):
                raise OSError(f"{name} did not come back from {self._path} as written. Check the disk.")
            self._missing.pop(name, None)

    def _put(self, place: int, content: Tensor) -> None:
        self._file.seek(place)
        left = content.numpy().data
        while left:
            left = left[self._file.write(left) :]

    def _holds(self, place: int, content: Tensor) -> bool:
        """Whether the file has this content at this place."""
        self._file.seek(place)
        found = torch.empty(min(_BLOCK, len(content)), dtype=torch.uint8)
        for block in content.split(_BLOCK):
            read = found[: len(block)]
            left = read.numpy().data
            while left:
                if not (size := self._file.readinto(left)):
                    return False
                left = left[size:]
            # Words are compared three times as fast as bytes.
            words = len(block) % 8 == block.storage_offset() % 8 == 0
            kind = torch.int64 if words else torch.uint8
            if not torch.equal(read.view(kind), block.view(kind)):
                return False
        return True

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{self._path} got no values for {', '.join(self._missing)}.")

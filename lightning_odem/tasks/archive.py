"""One task in a MedMNIST-format ``.npz`` file."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

LARGEST_LABEL = 10**6
"""A head has an output for every class up to the largest label."""
LARGEST_ARRAY, LARGEST_RATIO = 2**31, 100
"""An array of more bytes that is compressed by more is taken for one made to fill the memory."""
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpzArchive:
    """A MedMNIST-format file, checked on opening and read split by split.

    Opening reads only the labels and the headers of the images. The checksum of every array that is read is verified.
    Pickled objects are refused.

    Args:
        path: The file, with ``{train,val,test}_images`` uint8 [N, H, W] or [N, H, W, 3] and ``{train,val,test}_labels``
            integer [N] or [N, 1]. The ``val`` pair may be absent.

    Attributes:
        labels: Labels int64 [N] by split.

    Raises:
        ValueError: If the file cannot be read or holds other data; the message names the file and what was found.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                keys = {name.removesuffix(".npy") for name in archive.namelist()}
        except Exception as error:  # zipfile raises six kinds of its own on damaged input
            raise ValueError(f"{path} is not a readable .npz file: {error!r}.") from error
        splits = ["train", "val", "test"] if keys & {"val_images", "val_labels"} else ["train", "test"]
        wanted = {f"{split}_{kind}" for split in splits for kind in ("images", "labels")}
        if wanted - keys:
            raise ValueError(f"{path} lacks {sorted(wanted - keys)}; found {sorted(keys)}.")
        self.labels = {split: self._labels(split) for split in splits}
        for split in splits:
            with self._open(f"{split}_images") as member:
                shape, _, dtype = _HEADERS[np.lib.format.read_magic(member)](member)
            self._check(split, shape, dtype)

    def images(self, split: str) -> npt.NDArray[np.uint8]:
        """Images of a split, uint8 [N, H, W] or [N, H, W, 3]."""
        images = self._array(f"{split}_images")
        self._check(split, images.shape, images.dtype)
        return images

    def _labels(self, split: str) -> npt.NDArray[np.int64]:
        labels = self._array(f"{split}_labels")
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise ValueError(f"{self.path}: {split}_labels has {labels.shape[1]} labels per image, needs one.")
        if labels.shape not in ((labels.size,), (labels.size, 1)) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{self.path}: {split}_labels must be integer [N] or [N, 1], found {labels.dtype} {list(labels.shape)}."
            )
        if labels.size and (largest := int(labels.max())) > LARGEST_LABEL:
            raise ValueError(
                f"{self.path}: {split}_labels goes up to {largest}, which would make {largest + 1} classes; labels up "
                f"to {LARGEST_LABEL} are read."
            )
        return labels.reshape(-1).astype(np.int64)

    def _check(self, split: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)) or 0 in shape[1:]:
            raise ValueError(
                f"{self.path}: {split}_images must be uint8 [N, H, W] or [N, H, W, 3], found {dtype} {list(shape)}."
            )
        if shape[0] != len(self.labels[split]):
            raise ValueError(f"{self.path}: {split} has {shape[0]} images but {len(self.labels[split])} labels.")

    def _array(self, key: str) -> npt.NDArray:
        with self._open(key) as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            # Reading to the end makes zipfile verify the checksum, even if a damaged header asks for less.
            if member.read():
                raise ValueError("there is more data than its header says")
        return array

    @contextmanager
    def _open(self, key: str) -> Iterator[IO[bytes]]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                size, packed = (found := archive.getinfo(f"{key}.npy")).file_size, max(found.compress_size, 1)
                if size > LARGEST_ARRAY and size > LARGEST_RATIO * packed:
                    raise ValueError(f"it unpacks from {packed} to {size} bytes, more than images or labels do")
                with archive.open(found) as member:
                    yield member
        except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on damaged input
            raise ValueError(f"{self.path}: cannot read {key}: {error!r}.") from error

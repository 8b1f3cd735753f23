"""A folder of MedMNIST-format files as a stream."""

from functools import partial
from pathlib import Path
from typing import Any

from lightning_odem.arguments import LARGEST_IMAGE, check_integer, check_path
from lightning_odem.tasks.archive import NpzArchive
from lightning_odem.tasks.base import TaskStream
from lightning_odem.tasks.dataset import ArrayDataset
from lightning_odem.tasks.selection import Selection, preprocessing
from lightning_odem.tasks.splits import Splits
from lightning_odem.tasks.task import Task


class NpzStream(TaskStream):
    """One task per MedMNIST-format ``.npz`` file of a folder, in alphabetical order of the file names.

    A file holds ``{train,val,test}_images`` uint8 [N, H, W] (grey) or [N, H, W, 3] and ``{train,val,test}_labels``
    integer [N] or [N, 1]. If there is no ``val`` pair, a tenth of the training samples is split off by ``seed``, with
    the classes in proportion. The number of classes is the largest label of all splits plus one.

    Args:
        root: The folder.
        channels: 3 repeats grey images to RGB (so that all tasks fit one model), 1 turns colour to grey.
        image_size: Height and width of the images; None keeps the sizes in the files.
        **kwargs: Common arguments of :class:`~lightning_odem.tasks.TaskStream`.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no ``.npz`` file.
        ValueError: If a file is damaged or of another format; the message names the file and what was found.
    """

    def __init__(self, root: str | Path, channels: int = 3, image_size: int | None = None, **kwargs: Any) -> None:
        if (channels := check_integer("channels", channels, 0)) not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}.")
        if image_size is not None:
            image_size = check_integer("image_size", image_size, 1, LARGEST_IMAGE)
        root = check_path("root", root)
        files = sorted(root.glob("*.npz"))
        if not files:
            raise FileNotFoundError(f"No .npz file in {root}: it must be a folder with one MedMNIST file per task.")
        super().__init__({path.stem: partial(_build, path, channels, image_size) for path in files}, **kwargs)


def _build(path: Path, channels: int, image_size: int | None, seed: int, **options: Any) -> Task:
    archive = NpzArchive(path)
    return Task(
        path.stem,
        num_classes=1 + max(int(labels.max(initial=0)) for labels in archive.labels.values()),
        splits=partial(_read, archive, channels, image_size, seed),
        source=str(path),
        seed=seed,
        **options,
    )


def _read(archive: NpzArchive, channels: int, image_size: int | None, seed: int) -> Splits:
    transform = preprocessing(image_size, channels)
    parts = {
        split: Selection(ArrayDataset(archive.images(split), labels), labels, transform=transform)
        for split, labels in archive.labels.items()
    }
    if "val" not in parts:
        parts["train"], parts["val"] = parts["train"].hold_out(0.1, seed)
    return Splits(**parts)

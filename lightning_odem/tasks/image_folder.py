"""Folders of image files as a stream."""

from functools import partial
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader, find_classes

from lightning_odem.arguments import LARGEST_IMAGE, check_integer, check_path
from lightning_odem.tasks.base import TaskStream
from lightning_odem.tasks.selection import Selection, preprocessing
from lightning_odem.tasks.splits import Splits
from lightning_odem.tasks.task import Task


class ImageFolderStream(TaskStream):
    """One task per folder: ``root/<task>/{train,val,test}/<class>/*.png``, in alphabetical order.

    Each split is a ``torchvision.datasets.ImageFolder``, so any format that it reads works. If a task has no ``val``, a
    tenth of its training samples is split off by ``seed``, with the classes in proportion.

    Args:
        root: Folder of the task folders.
        image_size: Height and width to which images are resized and centre-cropped; they come out as RGB.
        **kwargs: Common arguments of :class:`~lightning_odem.tasks.TaskStream`.

    Raises:
        FileNotFoundError: If the folder holds no task folder, or a task lacks ``train`` or ``test`` or has no classes.
        ValueError: If the splits of a task have different class folders. On reading: if an image file is damaged.
    """

    def __init__(self, root: str | Path, image_size: int = 32, **kwargs: Any) -> None:
        root, image_size = check_path("root", root), check_integer("image_size", image_size, 1, LARGEST_IMAGE)
        folders = sorted(path for path in root.glob("*") if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise FileNotFoundError(f"No task folder in {root}: expected {root}/<task>/train/<class>/<image file>.")
        super().__init__({folder.name: partial(_build, folder, image_size) for folder in folders}, **kwargs)


def _build(folder: Path, image_size: int, seed: int, **options: Any) -> Task:
    splits = [split for split in Splits._fields if split != "val" or (folder / split).is_dir()]
    for split in splits:
        if not (folder / split).is_dir():
            raise FileNotFoundError(f"Task {folder.name!r}: {folder / split} is missing; it must hold <class> folders.")
    classes = {split: find_classes(folder / split)[0] for split in splits}
    for split in splits:
        if classes[split] != classes["train"]:
            raise ValueError(
                f"Task {folder.name!r}: the classes in {folder} differ between splits; "
                f"only in train: {sorted(set(classes['train']) - set(classes[split]))}, "
                f"only in {split}: {sorted(set(classes[split]) - set(classes['train']))}."
            )
    return Task(
        folder.name,
        num_classes=len(classes["train"]),
        splits=partial(_read, folder, splits, image_size, seed),
        source=str(folder),
        seed=seed,
        **options,
    )


def _read(folder: Path, splits: list[str], image_size: int, seed: int) -> Splits:
    # A class may lack images in one split. The class folders, and so the labels, are the same in all splits.
    datasets = {split: ImageFolder(folder / split, loader=_load, allow_empty=True) for split in splits}
    transform = preprocessing(image_size)
    parts = {split: Selection(data, data.targets, transform=transform) for split, data in datasets.items()}
    if "val" not in parts:
        parts["train"], parts["val"] = parts["train"].hold_out(0.1, seed)
    return Splits(**parts)


def _load(path: str) -> Any:
    try:
        return default_loader(path)
    except OSError as error:
        raise ValueError(f"{path} is not a readable image: {error}.") from error

"""Datasets of torchvision as a stream."""

from functools import partial
from pathlib import Path
from typing import Any

from lightning_odem.arguments import LARGEST_IMAGE, check_flag, check_integer, check_path
from lightning_odem.tasks.base import TaskStream
from lightning_odem.tasks.catalogue import CATALOGUE, Entry, labels_of
from lightning_odem.tasks.class_names import CLASS_NAMES
from lightning_odem.tasks.selection import Selection, preprocessing
from lightning_odem.tasks.splits import Splits
from lightning_odem.tasks.task import Task


class TorchvisionStream(TaskStream):
    """Datasets of torchvision by name, one per task.

    Official splits are kept. SUN397, RESISC45 and EuroSAT have none: a fifth of their samples becomes the test split.
    If there is no validation split, a tenth of the training samples is split off for it. ``seed`` draws both splits,
    with the classes in proportion, so they differ from those of other publications. Labels start at 0 (EMNIST's letters
    are shifted). Images are as torchvision gives them (EMNIST's are transposed), resized and centre-cropped to RGB.

    ``SUITE_8``, ``SUITE_14`` and ``SUITE_20`` list the usual suites. RESISC45 is in all of them but not in torchvision:
    put its folder of classes, ``NWPU-RESISC45``, into ``root``. It is split like SUN397.

    Args:
        root: Folder that torchvision gets as ``root``.
        tasks: Names from ``SUITE_20``.
        image_size: Height and width of the images; 224 fits the usual vision transformers.
        download: Download what is missing when a fit begins (not possible for stanford-cars, resisc45 and fer2013).
        **kwargs: The other common arguments of :class:`~lightning_odem.tasks.TaskStream`.

    Raises:
        FileNotFoundError: If a dataset is not in ``root`` and ``download`` is off.
        ValueError: If a task is unknown.
        RuntimeError: On reading, if torchvision cannot read a dataset.
    """

    def __init__(
        self, root: str | Path, tasks: list[str], image_size: int = 224, download: bool = False, **kwargs: Any
    ) -> None:
        root, image_size = check_path("root", root), check_integer("image_size", image_size, 1, LARGEST_IMAGE)
        check_flag("download", download)
        builders = {name: partial(_build, name, root, image_size, download) for name in CATALOGUE}
        super().__init__(builders, tasks=tasks, **kwargs)


def _build(name: str, root: Path, image_size: int, download: bool, seed: int, **options: Any) -> Task:
    entry = CATALOGUE[name]
    download = download and entry.downloads
    if not download and not (root / entry.place).exists():
        remedy = "Set download=True, or put its files" if entry.downloads else "torchvision cannot download it; put it"
        raise FileNotFoundError(f"Task {name!r}: {root / entry.place} does not exist. {remedy} there.")
    return Task(
        name,
        num_classes=entry.num_classes,
        splits=partial(_read, name, root, image_size, seed),
        source=f"torchvision in {root}",
        seed=seed,
        prepare=partial(_parts, entry, root, download=True) if download else None,
        class_names=CLASS_NAMES.get(name),
        **options,
    )


def _parts(entry: Entry, root: Path, **options: Any) -> dict[str, Any]:
    parts = {"train": entry.train, "val": entry.val, "test": entry.test}
    return {split: entry.dataset(root, **part, **options) for split, part in parts.items() if part is not None}


def _read(name: str, root: Path, image_size: int, seed: int) -> Splits:
    entry = CATALOGUE[name]
    transform = preprocessing(image_size)
    try:
        parts = {
            split: Selection(dataset, labels_of(dataset) - entry.first_label, transform=transform)
            for split, dataset in _parts(entry, root).items()
        }
    except ImportError:
        raise
    except Exception as error:  # every dataset has its own reader with its own errors
        raise RuntimeError(f"Task {name!r}: torchvision cannot read it in {root}: {error!r}.") from error
    for split, fraction in (("test", 0.2), ("val", 0.1)):
        if split not in parts:
            parts["train"], parts[split] = parts["train"].hold_out(fraction, seed)
    return Splits(**parts)

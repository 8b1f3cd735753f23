"""A section of a stored state by reference, for files that are written far more often than it changes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_odem.stream.store.encoding import decode
from lightning_odem.stream.store.error import DamagedFileError, StreamStateError
from lightning_odem.stream.store.manifest import Section
from lightning_odem.stream.store.tensor_file import TensorFile


def refer(section: Section | None, directory: Path) -> dict[str, Any] | None:
    """A section without its tensors, as plain containers; None if it has no tensors that are on disk.

    Args:
        section: The section as it was saved or loaded last.
        directory: The folder of the state.
    """
    if section is None or section.file is None or not section.file.is_in(directory):
        return None
    return {"structure": section.structure, "file": asdict(section.file), "directory": str(directory.absolute())}


def resolve(reference: dict[str, Any], *places: Path) -> Any:
    """The value of the section, its tensors read from the first of some folders that has them.

    Args:
        reference: As :func:`refer` gave it.
        places: Folders to look in before the one that was referred to.

    Raises:
        StreamStateError: If no folder has the file, or the file has changed.
    """
    file = TensorFile(**reference["file"])
    folders = [*places, Path(reference["directory"])]
    found = next((folder for folder in folders if file.is_in(folder)), None)
    if found is None:
        raise StreamStateError(
            f"The checkpoint refers to calibration samples in {file.name}, which is not in "
            f"{' or '.join(str(folder) for folder in dict.fromkeys(folders))}: the stream was moved, or has merged two "
            "tasks since. Copy the folder there, or write checkpoints that carry the samples: "
            "CalibrationOptions(in_checkpoints=True)."
        )
    try:
        return decode(reference["structure"], file.read(found))
    except DamagedFileError as error:
        raise StreamStateError(str(error)) from error

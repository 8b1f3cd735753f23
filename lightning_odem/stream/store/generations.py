"""The files of a stream's state: a manifest for each generation, and the tensor files that manifests name."""

import os
import re
from pathlib import Path
from typing import Any

from lightning_odem.parameters.files import remove_folder, sync
from lightning_odem.stream.store.encoding import decode
from lightning_odem.stream.store.error import DamagedFileError, StreamStateError
from lightning_odem.stream.store.manifest import TENSOR_FILE, Manifest, Section, tensor_files
from lightning_odem.stream.store.tensor_file import TensorFile, checksums

_MANIFEST = re.compile(r"(\d{6,})\.json")


class Generations:
    """Reads, writes and removes the files of a directory; :class:`StreamStore` decides which generations there are.

    Args:
        directory: The directory. Files of other names in it are left alone.

    Attributes:
        drafts: A folder in it for files that are not complete.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        # safetensors puts temporary files of its own beside the given one; all files in here are drafts.
        self.drafts = self.directory / "drafts"

    def numbers(self) -> list[int]:
        """Numbers of the generations whose manifests are there, damaged or not."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise NotADirectoryError(f"{self.directory} is no directory, so it holds no state of a stream.") from None
        return [int(found[1]) for name in names if (found := _MANIFEST.fullmatch(name))]

    def manifest(self, number: int) -> Path:
        """The path of a generation's manifest."""
        return self.directory / f"{number:06d}.json"

    def sections(self, number: int) -> dict[str, Section]:
        """The sections of a generation by name, from its manifest.

        Raises:
            DamagedFileError: If the manifest is not what was written.
            StreamStateError: If it cannot be read, or a newer version of the package wrote it.
        """
        path = self.manifest(number)
        try:
            return Manifest.read(path, number).sections
        except OSError as error:
            raise _unreadable(path, error) from error

    def read(self, number: int, mapped: bool) -> tuple[dict[str, Any], dict[str, str], dict[str, Section]]:
        """The sections of a generation that are whole, what is wrong with the others, and all from the manifest."""
        try:
            sections = self.sections(number)
        except DamagedFileError as error:
            return {}, {"manifest": str(error)}, {}
        state, broken = {}, {}
        for name, section in sections.items():
            try:
                state[name] = self.read_section(number, name, section, mapped)
            except DamagedFileError as error:
                broken[name] = str(error)
        return state, broken, sections

    def read_section(self, number: int, name: str, section: Section, mapped: bool) -> Any:
        """The value of a section of a generation.

        Raises:
            DamagedFileError: If its file is missing or not what was written.
            StreamStateError: If the file cannot be read.
        """
        try:
            tensors = {} if section.file is None else section.file.read(self.directory, mapped)
            return decode(section.structure, tensors)
        except FileNotFoundError as error:  # since it was looked for
            raise DamagedFileError(f"{error.filename} is missing.") from error
        except DamagedFileError as error:
            assert section.file is not None, "it was read"
            raise DamagedFileError(f"{error}{section.file.describe(self.directory, section.crc32)}") from error
        except OSError as error:
            raise _unreadable(self.directory / (section.file.name if section.file else ""), error) from error
        except StreamStateError:
            raise
        except ValueError as error:
            raise DamagedFileError(f"{self.manifest(number)}, section {name!r}: {error}") from error

    def write_section(self, name: str, structure: Any, tensors: dict[str, Any]) -> Section:
        """Write the tensors of a section to a file that is named by its hash."""
        if not tensors:
            return Section(structure)
        draft = self.drafts / f"{name}.safetensors"
        file = TensorFile.write(tensors, name, draft)
        os.replace(draft, self.directory / file.name)
        return Section(structure, file, checksums(tensors))

    def write_manifest(self, manifest: Manifest) -> None:
        """Write a manifest. Its generation exists from then on, so the files that it names are written before."""
        draft = self.drafts / "manifest.json"
        draft.write_text(manifest.to_text(), encoding="utf-8")
        sync(draft)
        # The files that it names are on disk under their names before it is.
        sync(self.directory)
        os.replace(draft, self.manifest(manifest.number))
        sync(self.directory)

    def remove_drafts(self) -> None:
        """Remove files that were not completed."""
        remove_folder(self.drafts)

    def remove_unused(self) -> None:
        """Remove tensor files that no manifest names; damaged manifests are searched for names too."""
        manifests = [path for path in self.directory.iterdir() if _MANIFEST.fullmatch(path.name) and path.is_file()]
        used = {name for path in manifests for name in tensor_files(path.read_text("utf-8", "replace"))}
        for path in self.directory.iterdir():
            if TENSOR_FILE.fullmatch(path.name) and path.name not in used:
                path.unlink()


def _unreadable(path: Path, error: OSError) -> StreamStateError:
    # Not damaged, so an older generation must not replace it: an unreachable file system comes back.
    return StreamStateError(f"{path} cannot be read: {error.strerror or error}.")

"""The manifest of one generation of a stream's state."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_odem.parameters.files import NotRegularError, read_regular
from lightning_odem.parameters.json_text import json_lines
from lightning_odem.stream.store.error import DamagedFileError, StreamStateError
from lightning_odem.stream.store.tensor_file import TensorFile

FORMAT = 1
"""Version of the format on disk that is written, and the newest that is read."""

TENSOR_FILE = re.compile(r"[A-Za-z0-9_]+-[0-9a-f]{16}\.safetensors")
_NAMED = re.compile(TENSOR_FILE.pattern + "$")
_END = ".safetensors"
_LONGEST = 255  # what file systems allow


@dataclass(frozen=True)
class Section:
    """One top-level entry of the state.

    Args:
        structure: The structure of its value, see :func:`~lightning_odem.stream.store.encode`.
        file: The file of its tensors; None if it has none.
        crc32: A checksum of each tensor's bytes by name. It tells which tensors of a damaged file are whole.
    """

    structure: Any
    file: TensorFile | None = None
    crc32: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The sections of one generation; on disk it is a JSON file with a checksum of all its bytes.

    Args:
        number: Number of the generation, from 1.
        sections: The sections by name.
        package: Version of the package that wrote it.
    """

    number: int
    sections: dict[str, Section]
    package: str

    def to_text(self) -> str:
        """A JSON object whose first line is the SHA-256 of all that follows.

        Later versions keep the first line and ``format``, so that each version can tell another's files from damaged
        ones.
        """
        sections = {
            name: {
                "value": section.structure,
                **({} if section.file is None else {"file": asdict(section.file), "crc32": section.crc32}),
            }
            for name, section in self.sections.items()
        }
        content = {"format": FORMAT, "package": self.package, "number": self.number, "sections": sections}
        # The opening brace is in the first line.
        body = json_lines(content, depth=2)[1:] + "\n"
        return _first_line(body.encode()).decode() + body

    @classmethod
    def read(cls, path: Path, number: int) -> "Manifest":
        """Read the manifest of a generation.

        Raises:
            DamagedFileError: If the file is missing or not what was written.
            StreamStateError: If a newer version of the package wrote it.
        """
        try:
            data = read_regular(path)
        except NotRegularError as error:
            raise DamagedFileError(str(error)) from None
        except FileNotFoundError:
            raise DamagedFileError(f"{path} is missing.") from None
        length = len(_first_line(b""))
        if data[:length] != _first_line(data[length:]):
            raise DamagedFileError(f"{path} has changed since it was written: its checksum is not that of its content.")
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DamagedFileError(f"{path} is not JSON: {error}") from error
        match content:
            case {"format": int(version)} if version > FORMAT:
                raise StreamStateError(
                    f"{path} has format {version}, written by version {content.get('package')!r:.20} of "
                    f"lightning-odem; this version reads format {FORMAT}. Update the package to go on with this stream."
                )
            case {"format": 1, "number": int(found), "package": str(package), "sections": dict(entries)}:
                if found != number:
                    raise DamagedFileError(f"{path} is the manifest of generation {found}.")
                return cls(number, {name: _section(path, name, entry) for name, entry in entries.items()}, package)
        raise DamagedFileError(f"{path} is not the manifest of a stream's state.")


def tensor_files(text: str) -> set[str]:
    """Names of tensor files in the text of a manifest, damaged or not.

    The plain search for the end of a name is many times as fast as that for the pattern.

    Example:
        >>> tensor_files('{"file": "base-0123456789abcdef.safetensors"')
        {'base-0123456789abcdef.safetensors'}
    """
    pieces = text.split(_END)[:-1]
    return {found[0] for piece in pieces if (found := _NAMED.search(piece[-_LONGEST:] + _END))}


def _first_line(body: bytes) -> bytes:
    return b'{"checksum": "%s",' % hashlib.sha256(body).hexdigest().encode()


def _section(path: Path, name: str, entry: Any) -> Section:
    match entry:
        case {"value": structure, "file": {"name": str(file), "size": int(size), "sha256": str(digest)}}:
            # A name in the same directory, never a path.
            if TENSOR_FILE.fullmatch(file):
                sums = found if isinstance(found := entry.get("crc32"), dict) else {}
                return Section(structure, TensorFile(file, size, digest), sums)
        case {"value": structure} if len(entry) == 1:
            return Section(structure)
    raise DamagedFileError(f"{path} does not tell where section {name!r:.40} is.")

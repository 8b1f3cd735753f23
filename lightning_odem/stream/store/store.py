"""The generations of a stream's state in one directory."""

import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_odem import version
from lightning_odem.parameters.files import sync
from lightning_odem.stream.store.encoding import encode
from lightning_odem.stream.store.error import StreamStateError
from lightning_odem.stream.store.generations import Generations
from lightning_odem.stream.store.manifest import Manifest, Section
from lightning_odem.stream.store.tensor_file import TensorFile

_NAME = re.compile(r"[A-Za-z0-9_]+")


class StreamStore:
    """Keeps the two newest generations of a state; each is on disk completely or not at all.

    A state is a dict of sections. The tensors of a section are in one safetensors file, named by its hash. All the rest
    is in the manifest of the generation, a JSON file. None of these files can run code. A generation exists once its
    manifest exists. The manifest is renamed into place after all files that it names have reached the disk. So a
    process can be killed, and the power can fail, at any moment. A directory has one writer at a time
    (:class:`StreamLock`).

    A section with tensors is not written again if its value is the same object (``is``) that was saved, loaded or
    mapped last. So sections have to be replaced, never changed in place.

    Args:
        directory: The directory of the files. The first :meth:`save` makes it. Files of other names in it are left
            alone.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = StreamStore(folder)
        ...     number = store.save({"merged": {"weight": torch.ones(2)}, "tasks": ["digits"]})
        ...     number, sorted(path.suffix for path in Path(folder).iterdir()), StreamStore(folder).load()
        (1, ['.json', '.safetensors'], {'merged': {'weight': tensor([1., 1.])}, 'tasks': ['digits']})
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        self._files = Generations(directory)
        self._known: dict[str, tuple[Any, Section]] = {}
        self._current: int | None = None
        self._lacking: dict[str, Section] = {}

    @property
    def number(self) -> int | None:
        """Number of the newest generation on disk, damaged or not; None if there is none. Only names are read."""
        return max(self._files.numbers(), default=None)

    def save(self, state: dict[str, Any]) -> int:
        """Write the next generation, then remove files that the two newest do not need.

        Args:
            state: Sections by name (letters, digits, underscores), with values that :func:`encode` can store.

        Returns:
            The number of the generation.

        Raises:
            TypeError: If a section holds something that cannot be stored. Nothing is written then.
            ValueError: If a name has other characters.
            OSError: If a file cannot be written, with the system's ``errno``. Earlier generations are as they were.
        """
        if wrong := [name for name in state if not _NAME.fullmatch(name)]:
            raise ValueError(
                f"Sections are named by letters, digits and underscores, got {', '.join(map(repr, wrong))}."
            )
        if self._lacking:
            raise StreamStateError(f"{self.directory} lacks {', '.join(self._lacking)}, whose files are damaged.")
        encoded = {name: encode(value, name) for name, value in state.items() if not self._is_written(name, value)}
        newest = self.number
        number = (newest or 0) + 1
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._files.remove_drafts()
            self._files.drafts.mkdir()
            sections = {
                name: self._files.write_section(name, *encoded[name]) if name in encoded else self._known[name][1]
                for name in state
            }
            self._files.write_manifest(Manifest(number, sections, version.__version__))
        except BaseException as error:
            with suppress(OSError):
                self._files.manifest(number).unlink(missing_ok=True)
                self._files.remove_unused()
            if not isinstance(error, OSError):
                raise
            what = f"{error.strerror or error} ({error.filename or self.directory})"
            raise OSError(
                error.errno,
                f"The state of the stream could not be written to {self.directory}: {what}. "
                "What was saved there before is intact.",
            ) from error
        finally:
            self._files.remove_drafts()
        self._known = {name: (value, sections[name]) for name, value in state.items()}
        # The generation before this is the one that was loaded; a newer damaged one is removed.
        before, self._current = self._current or newest, number
        with suppress(OSError):
            for other in self._files.numbers():
                if other not in (before, number):
                    self._files.manifest(other).unlink()
            self._files.remove_unused()
        return number

    def load(
        self,
        mapped: bool = False,
        check: Callable[[dict[str, Any]], None] = lambda state: None,
        mendable: Collection[str] = (),
    ) -> dict[str, Any] | None:
        """The state of the newest undamaged generation; there is a warning if a newer one is damaged.

        Args:
            mapped: Whether to map the tensor files into memory instead of reading them. A tensor then costs memory only
                while it is used. The files are read once in any case, to check them.
            check: Raises a ValueError for a state that is whole but cannot be used. No older one is taken instead.
            mendable: Sections whose files may be damaged. They are None then, with a warning, and :meth:`mend` has to
                be given them before the next :meth:`save`.

        Returns:
            The state; None if there is no generation.

        Raises:
            StreamStateError: If all generations are damaged, a newer version of the package wrote one, or a file exists
                but cannot be read.
        """
        numbers = sorted(self._files.numbers(), reverse=True)
        damage: list[str] = []
        for number in numbers:
            state, broken, sections = self._files.read(number, mapped)
            if broken and sorted(self._files.numbers(), reverse=True) != numbers:
                return self.load(mapped, check, mendable)  # a writer went on while this was read
            if broken.keys() - set(mendable):
                whole = f" Whole are {', '.join(state)}." if state else ""
                damage.append(" ".join(broken.values()) + whole)
                continue
            state = {name: state.get(name) for name in sections}
            try:
                check(state)
            except ValueError as error:
                raise StreamStateError(
                    f"{self._files.manifest(number)} is no state of a stream that can be taken up: {error}."
                ) from error
            if damage:
                rank_zero_warn(
                    f"The newest state of the stream is damaged: {' '.join(damage)} The stream goes on from generation "
                    f"{number}, the one before; what was done after it is lost."
                )
            if broken:
                rank_zero_warn(
                    f"{' '.join(broken.values())} The rest of the stream is whole: it goes on as soon as it is given "
                    f"what was in there ({', '.join(broken)})."
                )
            self._known = {name: (state[name], section) for name, section in sections.items() if name not in broken}
            self._lacking = {name: sections[name] for name in broken}
            self._current = number
            return state
        if damage:
            raise StreamStateError(f"No state of the stream in {self.directory} is whole: {' '.join(damage)}")
        return None

    @property
    def lacking(self) -> list[str]:
        """Sections that :meth:`load` did without."""
        return list(self._lacking)

    def mend(self, section: str, value: Any) -> bool:
        """Write a lacking section again if it is given the very value that was in the damaged file.

        Returns:
            Whether it is; nothing is changed otherwise.

        Raises:
            OSError: If it cannot be written.
        """
        lacking = self._lacking[section]
        self._files.drafts.mkdir(parents=True, exist_ok=True)
        try:
            structure, tensors = encode(value, section)
            draft = self._files.drafts / f"{section}.safetensors"
            file = TensorFile.write(tensors, section, draft) if tensors else None
            if structure != lacking.structure or file != lacking.file:
                return False
            assert file is not None, "it was damaged"
            os.replace(draft, self.directory / file.name)
            sync(self.directory)
        finally:
            self._files.remove_drafts()
        del self._lacking[section]
        self._known[section] = (value, lacking)
        return True

    def map(self, section: str) -> Any:
        """A section of the newest generation with its tensors mapped; :meth:`save` does not write it again.

        Raises:
            StreamStateError: If there is no generation or the section is damaged.
            ValueError: If there is no such section.
        """
        number = self.number
        if number is None:
            raise StreamStateError(f"{self.directory} holds no state of a stream.")
        sections = self._files.sections(number)
        if section not in sections:
            raise ValueError(f"Generation {number} in {self.directory} has {', '.join(sections)}, but no {section!r}.")
        value = self._files.read_section(number, section, sections[section], mapped=True)
        self._known[section] = (value, sections[section])
        return value

    def section(self, name: str) -> Section | None:
        """A section as it was saved, loaded or mapped last, by this object; None if there is none."""
        return self._known[name][1] if name in self._known else None

    def _is_written(self, name: str, value: Any) -> bool:
        known, section = self._known.get(name, (None, Section(None)))
        return known is value and section.file is not None and section.file.is_in(self.directory)

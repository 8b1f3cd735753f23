"""The files that an offline merge writes."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_odem.parameters.files import make_writable, replacing
from lightning_odem.parameters.weights_writer import WeightsWriter

Write = Callable[[Mapping[str, Tensor]], None]
"""Writes some of the tensors of an output."""


class MergeOutput:
    """Writes merged weights in one step: a reader sees the old files or the new ones.

    The path means a ``.safetensors`` file and, beside it, a Lightning checkpoint ``.ckpt`` with the same weights.

    Args:
        path: The output path, as described above.
        inputs: The checkpoints that are merged, and the base model. They are never overwritten.
        overwrite: Whether existing files are replaced.

    Attributes:
        paths: The files to be written.
        checked: Empty; no library has a format of single files to check them by.

    Raises:
        ValueError: If an input is in the way.
        FileExistsError: If the output exists and ``overwrite`` is off.
    """

    def __init__(self, path: str | os.PathLike, inputs: Sequence[str | os.PathLike], overwrite: bool = False) -> None:
        path = Path(path)
        self.checked = ""
        self.paths = [path, path.with_suffix(".ckpt")]
        occupied = {Path(entry).resolve() for entry in inputs}
        if any(found.resolve() in occupied for found in self.paths):
            raise ValueError(f"The output {path} would overwrite one of the checkpoints; choose another name.")
        if not overwrite and (found := [str(found) for found in self.paths if found.exists()]):
            raise FileExistsError(f"{' and '.join(found)} exists already. Choose another output, or overwrite it.")

    def prepare(self) -> None:
        """Make the directory, so that an output that cannot be written is found before the work."""
        make_writable(self.paths[0].parent)

    @contextmanager
    def writing(
        self, like: Mapping[str, Tensor], metadata: Mapping[str, str], hyper_parameters: Mapping[str, Any]
    ) -> Iterator[Write]:
        """Write the weights as they come; the files get their names when the block ends without an error.

        Args:
            like: All tensors by name, with shapes and dtypes; values may be missing.
            metadata: Metadata for the header of the ``.safetensors`` file; a checkpoint has it under
                ``"lightning_odem"``.
            hyper_parameters: Entries from which ``load_from_checkpoint`` makes its module.

        Yields:
            A function that writes some of the tensors, which lie on the CPU.
        """
        with ExitStack() as stack:
            weights, beside = [stack.enter_context(replacing(path)) for path in self.paths]
            with WeightsWriter(weights, like, {"format": "pt", **metadata}) as writer:
                yield writer.write
            # Required by load_from_checkpoint and trainer.test(ckpt_path=...); there is no training to resume.
            kept = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": L.__version__}
            state = load_mapped(weights, like)
            torch.save({"state_dict": state, **kept, **hyper_parameters, "lightning_odem": dict(metadata)}, beside)
            del state  # some systems cannot rename a file that is mapped

    def write(
        self, state: Mapping[str, Tensor], metadata: Mapping[str, str], hyper_parameters: Mapping[str, Any]
    ) -> None:
        """Write weights that lie on the CPU, see :meth:`writing`."""
        with self.writing(state, metadata, hyper_parameters) as write:
            write(state)


def load_mapped(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file in the order of ``names``, mapped into memory."""
    found = load_file(path)
    return {name: found[name] for name in names}

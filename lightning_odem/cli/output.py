"""The files that an offline merge writes."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_odem.parameters.files import make_writable, replacing


class MergeOutput:
    """Writes merged weights in one step: a reader sees the old files or the new ones.

    The path means a ``.safetensors`` file and, beside it, a Lightning checkpoint ``.ckpt`` with the same weights.

    Args:
        path: The output path, as described above.
        inputs: The checkpoints that are merged, and the base model. They are never overwritten.
        overwrite: Whether existing files are replaced.

    Raises:
        ValueError: If an input is in the way.
        FileExistsError: If the output exists and ``overwrite`` is off.
    """

    def __init__(self, path: str | os.PathLike, inputs: Sequence[str | os.PathLike], overwrite: bool = False) -> None:
        path = Path(path)
        self.paths = [path, path.with_suffix(".ckpt")]
        occupied = {Path(entry).resolve() for entry in inputs}
        if any(found.resolve() in occupied for found in self.paths):
            raise ValueError(f"The output {path} would overwrite one of the checkpoints; choose another name.")
        if not overwrite and (found := [str(found) for found in self.paths if found.exists()]):
            raise FileExistsError(f"{' and '.join(found)} exists already. Choose another output, or overwrite it.")

    def prepare(self) -> None:
        """Make the directory, so that an output that cannot be written is found before the work."""
        make_writable(self.paths[0].parent)

    def write(self, state: Mapping[str, Tensor], metadata: dict[str, str], hyper_parameters: dict[str, Any]) -> None:
        """Write the weights and their metadata.

        Args:
            state: Tensors on the CPU by name, without shared memory.
            metadata: Metadata for the header of the ``.safetensors`` file; a checkpoint has it under
                ``"lightning_odem"``.
            hyper_parameters: Entries from which ``load_from_checkpoint`` makes its module.
        """
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        with ExitStack() as stack:
            weights, beside = [stack.enter_context(replacing(path)) for path in self.paths]
            save_weights(state, weights, metadata)
            # Required by load_from_checkpoint and trainer.test(ckpt_path=...); there is no training to resume.
            kept = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": L.__version__}
            torch.save({"state_dict": state, **kept, **hyper_parameters, "lightning_odem": metadata}, beside)


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a ``.safetensors`` file, read it back and compare it with what was to be written.

    Raises:
        OSError: If they differ.
    """
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt", **metadata})
    found = load_file(path)
    if wrong := [name for name, tensor in state.items() if name not in found or not _is_same(tensor, found[name])]:
        raise OSError(f"{', '.join(wrong)} did not come back from {path.parent} as written. Check the disk.")


def _is_same(tensor: Tensor, found: Tensor) -> bool:
    # By their bytes, since NaN is not equal to itself.
    first, second = (each.contiguous().flatten().view(torch.uint8) for each in (tensor, found))
    return tensor.dtype == found.dtype and tensor.shape == found.shape and torch.equal(first, second)

"""The files that an offline merge writes."""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_odem.parameters.files import replacing

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class MergeOutput:
    """Writes merged weights in one step: a reader sees the old files or the new ones.

    A path that ends in ``.safetensors`` means that file and, beside it, a Lightning checkpoint ``.ckpt`` with the same
    weights. Any other path is a folder with ``model.safetensors`` and ``config.json`` as ``from_pretrained`` of
    transformers reads it.

    Args:
        path: The output path, as described above.
        inputs: The checkpoints that are merged, and the base model. They are never overwritten. For a folder, the first
            input is a folder too, and its configuration is copied.
        overwrite: Whether existing files are replaced.

    Raises:
        ValueError: If an input is in the way, or the first one has no configuration for a folder.
        FileExistsError: If the output exists and ``overwrite`` is off.
    """

    def __init__(self, path: str | os.PathLike, inputs: Sequence[str | os.PathLike], overwrite: bool = False) -> None:
        path = Path(path)
        self._config = None
        if path.suffix == ".safetensors":
            self.paths = [path, path.with_suffix(".ckpt")]
        else:
            self._config = Path(inputs[0]) / CONFIG
            self.paths = [path / WEIGHTS, path / CONFIG]
            if not self._config.is_file():
                raise ValueError(
                    f"The output {path} does not end in .safetensors, so it is a folder, for which the first "
                    f"checkpoint has to be a folder with a {CONFIG}; there is none in {inputs[0]}."
                )
        occupied = {Path(entry).resolve() for entry in inputs}
        if path.resolve() in occupied or any(found.resolve() in occupied for found in self.paths):
            raise ValueError(f"The output {path} would overwrite one of the checkpoints; choose another name.")
        if not overwrite and (found := [str(found) for found in self.paths if found.exists()]):
            raise FileExistsError(f"{' and '.join(found)} exists already. Choose another output, or overwrite it.")

    def prepare(self) -> None:
        """Make the directory, so that an output that cannot be written is found before the work."""
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)

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
            save_file(state, weights, {"format": "pt", **metadata})
            if self._config is not None:
                shutil.copyfile(self._config, beside)
            else:
                # Required by load_from_checkpoint and trainer.test(ckpt_path=...); there is no training to resume.
                kept = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": L.__version__}
                torch.save({"state_dict": state, **kept, **hyper_parameters, "lightning_odem": metadata}, beside)

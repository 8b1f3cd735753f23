"""The model folder that an offline merge writes."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lightning_odem.cli.load_check import check_by_loading
from lightning_odem.cli.model_card import CARD, model_card
from lightning_odem.cli.output import Write
from lightning_odem.parameters.adapter_folders import AdapterFolders
from lightning_odem.parameters.files import make_writable, replacing_folder
from lightning_odem.parameters.lora_files import LORA_FILE
from lightning_odem.parameters.model_files import match_names
from lightning_odem.parameters.model_folder import ADAPTER_CONFIG, ModelFolder
from lightning_odem.parameters.vector import canonical_name
from lightning_odem.parameters.weights_shards import divide, is_shard
from lightning_odem.parameters.weights_writer import WeightsWriter

_CONFIGS = ("config.json", ADAPTER_CONFIG, "modules.json", "open_clip_config.json", LORA_FILE)


class FolderOutput:
    """Writes merged weights as a folder like that of the first model, which gets its name when it is complete.

    All files that are not weights come from the first folder; a README becomes a model card. The result has exactly
    the tensors of the first, so that its configuration fits; those that were excluded are the first one's.

    Args:
        path: The output folder.
        inputs: The checkpoints that are merged, and the base model. They are never overwritten.
        overwrite: Whether an existing folder is replaced.
        adapters: The inputs as adapters; by default they are whole models.
        shard_size: Largest number of bytes of a file of weights; a single tensor may be larger. By default each module
            has one file.
        dtype: Dtype that the weights are written in, for the configuration; by default it stays.

    Attributes:
        paths: The files to be written.
        checked: What loading the folder with its library has shown, in a line.

    Raises:
        ValueError: If an input is in the way, the first one is no folder with a configuration, or an existing folder
            holds more than a merge would write.
        FileExistsError: If the output exists and ``overwrite`` is off.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        inputs: Sequence[str | os.PathLike],
        overwrite: bool = False,
        adapters: AdapterFolders | None = None,
        shard_size: int | None = None,
        dtype: str | None = None,
    ) -> None:
        self._path = Path(path)
        self._dtype = dtype
        self._shard_size = shard_size
        self._adapters = adapters
        self.checked = ""
        if not any(Path(inputs[0], name).is_file() for name in _CONFIGS):
            raise ValueError(
                f"The output {path} does not end in .safetensors, so it is a folder, for which the first "
                f"checkpoint has to be a folder with a config.json; there is none in {inputs[0]}."
            )
        self._first = ModelFolder(inputs[0])
        self._others = list(self._first.others())
        self._weights = {place: Path(place, _safe_name(file)) for place, file in self._first.weights.items()}
        self.paths = [self._path / name for name in [*self._weights.values(), *self._others]]
        target = self._path.resolve()
        if any(target == entry or target in entry.parents for entry in (Path(entry).resolve() for entry in inputs)):
            raise ValueError(f"The output {path} would overwrite one of the checkpoints; choose another name.")
        if target.exists() and not target.is_dir():
            raise FileExistsError(f"{path} exists already and is no folder. Choose another output.")
        found = [file for file in target.rglob("*") if not file.is_dir()] if target.exists() else []
        if found and not overwrite:
            raise FileExistsError(f"{path} exists already, with files in it. Choose another output, or overwrite it.")
        names = {*self._weights.values(), *self._others}
        if more := [
            str(file.relative_to(target))
            for file in found
            if file.relative_to(target) not in names and not is_shard(file)
        ]:
            raise FileExistsError(
                f"{path} has files that a merge would not write: {', '.join(sorted(more)[:5])}. Overwriting "
                "would lose them; choose another output."
            )

    def prepare(self) -> None:
        """Try to write there, so that an output that cannot be written is found before the work."""
        make_writable(self._path.parent)

    @contextmanager
    def writing(
        self, like: Mapping[str, Tensor], metadata: Mapping[str, str], hyper_parameters: Mapping[str, Any] = {}
    ) -> Iterator[Write]:
        """Write the folder, its weights as they come; it gets its name when the block ends without an error.

        Args:
            like: The merged tensors by name, with shapes and dtypes; values may be missing.
            metadata: Metadata for the headers of the weights and for the model card.
            hyper_parameters: Not used: a folder has its configuration.

        Yields:
            A function that writes some of the tensors, which lie on the CPU.

        Raises:
            OSError: If the weights do not come back as written.
            ValueError: If the library of the first folder does not load the merged one rightly.
        """
        own = {canonical_name(name): tensor for name, tensor in self._first.read().items()}
        names = self._own_names(own, like)
        whole = {**own, **{name: like[there] for name, there in names.items()}}
        with replacing_folder(self._path) as draft:
            self._write_others(draft, metadata)
            files: dict[str, list[Path]] = {}
            with ExitStack() as stack:
                place_of: dict[str, tuple[WeightsWriter, str]] = {}
                for place, file in self._weights.items():
                    # A module in a sub-folder has its tensors under the name of the folder.
                    others = tuple(f"{other}." for other in self._weights if other)
                    mine = {
                        name.removeprefix(f"{place}.") if place else name: tensor
                        for name, tensor in whole.items()
                        if (name.startswith(f"{place}.") if place else not name.startswith(others))
                    }
                    (draft / file).parent.mkdir(parents=True, exist_ok=True)
                    shards = divide(draft / file, mine, self._shard_size)
                    files[place] = list(shards)
                    for shard, tensors in shards.items():
                        writer = stack.enter_context(WeightsWriter(shard, tensors, {"format": "pt", **metadata}))
                        place_of |= {f"{place}.{name}" if place else name: (writer, name) for name in tensors}

                def write(tensors: Mapping[str, Tensor]) -> None:
                    for name, tensor in tensors.items():
                        writer, there = place_of[name]
                        writer.write({there: tensor})

                back = {there: name for name, there in names.items()}
                yield lambda tensors: write({back[name]: tensor for name, tensor in tensors.items() if name in back})
                write({name: tensor for name, tensor in own.items() if name not in names})
            written = {
                place: {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
                for place, shards in files.items()
            }
            self.checked = check_by_loading(draft, self._first.path, written)

    def write(
        self, state: Mapping[str, Tensor], metadata: Mapping[str, str], hyper_parameters: Mapping[str, Any] = {}
    ) -> None:
        """Write merged tensors that lie on the CPU, see :meth:`writing`."""
        with self.writing(state, metadata) as write:
            write(state)

    def _write_others(self, draft: Path, metadata: Mapping[str, str]) -> None:
        """Write all files that are not weights."""
        for name in self._others:
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            if name == Path(CARD):
                (draft / name).write_text(model_card(self._first.path / name, metadata), encoding="utf-8")
            elif name == Path(ADAPTER_CONFIG) and self._adapters is not None:
                (draft / name).write_text(json.dumps(self._adapters.config, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(self._first.path / name, draft / name)
        # transformers loads weights in the dtype of the configuration.
        config = self._first.config() if self._dtype is not None else {}
        if known := [key for key in ("dtype", "torch_dtype") if key in config]:
            text = json.dumps(config | dict.fromkeys(known, self._dtype), indent=2) + "\n"
            (draft / "config.json").write_text(text, encoding="utf-8")

    def _own_names(self, own: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, str]:
        """The merged name of each tensor that is merged, by its name in the result."""
        if self._adapters is not None:  # also of modules that the first does not adapt
            return {name: name for name in like}
        names = {name: there for name, there in match_names(own, like).items() if there in like}
        if len(names) < sum(tensor.is_floating_point() for tensor in like.values()):
            raise ValueError(
                f"The merged tensors do not have the names of those in {self._first.path}: {', '.join(like)}. Write a "
                ".safetensors file instead of a folder."
            )
        return names


def _safe_name(file: Path) -> str:
    """The name of a file of weights in safetensors, and in one piece."""
    if file.suffix == ".safetensors":
        return file.name
    if file.name.startswith("diffusion"):
        return "diffusion_pytorch_model.safetensors"
    return "adapter_model.safetensors" if file.name.startswith("adapter_model") else "model.safetensors"

"""What a merge of files is given: names, weights, adapters and what the method needs, checked before any work."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_odem.methods import MergeMethod
from lightning_odem.methods.needs import Offer
from lightning_odem.metrics import check_weights
from lightning_odem.parameters.adapter_folders import AdapterFolders, is_adapter_folder
from lightning_odem.parameters.lora_files import LoraFiles, is_lora_file
from lightning_odem.stream.merging import check_needs


class Incoming(NamedTuple):
    """A checkpoint to be merged.

    Args:
        path: Path of the checkpoint.
        task: Name of its task.
        weight: Utility weight.
    """

    path: str
    task: str
    weight: float


def task_names(checkpoints: Sequence[str]) -> list[str]:
    """Names of files without their suffix, and of folders; repeated names are numbered.

    Example:
        >>> task_names(["runs/a/last.ckpt", "runs/b/last.ckpt", "clip-dtd/"])
        ['last', 'last_2', 'clip-dtd']
    """
    names: list[str] = []
    for path in map(Path, checkpoints):
        stem = path.resolve().name if path.is_dir() else path.stem
        candidates = (stem if number == 1 else f"{stem}_{number}" for number in range(1, len(checkpoints) + 1))
        names.append(next(name for name in candidates if name not in names))
    return names


def check_lists(
    checkpoints: Sequence[str], names: Sequence[str], weights: Sequence[float] | None, exclude: object
) -> None:
    """Check that there is a name and a weight for each checkpoint.

    Raises:
        ValueError: If there is not.
    """
    if not checkpoints:
        raise ValueError("There is nothing to merge: no checkpoint was given.")
    if isinstance(exclude, str):
        raise ValueError(f"exclude is a list of patterns, got the string {exclude!r}; write [{exclude!r}].")
    for argument, values in {"tasks": names, "weights": weights}.items():
        if values is not None and len(values) != len(checkpoints):
            raise ValueError(f"{argument} has {len(values)} entries, but there are {len(checkpoints)} checkpoints.")
    if len(set(names)) < len(names):
        raise ValueError(f"Two tasks cannot have the same name, got {', '.join(names)}.")
    if weights is not None:
        check_weights(weights)


def find_adapters(
    inputs: Sequence[str], output: str, model: object, rank: int | None = None, energy: float | None = None
) -> AdapterFolders | None:
    """The inputs of a merge as adapters, with the rank or energy to keep; None if they are whole models.

    Raises:
        ValueError: If only some are adapters, adapters are to be merged with a module or into a file, or whole models
            get a rank.
    """
    found = [path for path in inputs if is_adapter_folder(path)]
    files = [] if found else [path for path in inputs if is_lora_file(path)]
    found = found or files
    if not found:
        if rank is not None or energy is not None:
            raise ValueError(f"rank and energy are for folders of adapters; {inputs[0]} is none. Leave them out.")
        return None
    if others := [path for path in inputs if path not in found]:
        raise ValueError(
            f"{found[0]} is an adapter, {others[0]} is none. Give folders of adapters only (they need no base), or "
            "fold each adapter into its base (in peft: merge_and_unload(), then save_pretrained) and merge these."
        )
    if model is not None:
        raise ValueError(
            f"{found[0]} is an adapter; folders of adapters are merged without model and data. To use samples, merge "
            "in the callback, which trains the adapters."
        )
    if files:
        if rank is not None or energy is not None:
            raise ValueError(f"rank and energy are for folders of peft; {files[0]} says its rank. Leave them out.")
        return LoraFiles(inputs)
    if Path(output).suffix == ".safetensors":
        raise ValueError(
            f"The output of a merge of adapters is a folder, since a file does not say the scale of the updates. Write "
            f"{Path(output).with_suffix('')}."
        )
    return AdapterFolders(inputs, rank, energy)


def check_sources(method: MergeMethod, has_base: bool, batch_norm: str, model: object, data: object) -> None:
    """Check that base model, model and data bring what a merge uses besides the checkpoints.

    Raises:
        ValueError: If something is missing, or needs a training.
    """
    if (model is None) != (data is None):
        raise ValueError("model and data go together: the one computes losses on the samples of the other.")
    if batch_norm == "recalibrate" and data is None:
        raise ValueError("batch_norm='recalibrate' runs samples through the model: give model and data.")
    try:
        check_needs(method, Offer(base=has_base, calibration=data is not None, batches=data is not None))
    except ValueError as error:
        raise ValueError(
            f"{error} For finished checkpoints, base names the base model, and model and data bring samples and a loss."
        ) from error

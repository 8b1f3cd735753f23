"""``lightning-odem merge``: folds existing checkpoints into one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from jsonargparse import ArgumentParser

from lightning_odem.cli.class_paths import UntrustedPathError, check_class_paths
from lightning_odem.cli.folded_files import FoldedFiles
from lightning_odem.cli.folded_stream import FoldedStream, choose_tasks
from lightning_odem.cli.folder_output import FolderOutput
from lightning_odem.cli.folding import Output, fold_adapters, fold_files, fold_in_module
from lightning_odem.cli.inputs import Incoming, check_lists, check_sources, find_adapters, task_names
from lightning_odem.cli.merged import Merged, metadata_of
from lightning_odem.cli.output import MergeOutput
from lightning_odem.methods import MergeMethod, resolve_method
from lightning_odem.parameters.adapted_base import AdaptedBase
from lightning_odem.parameters.adapter_folders import AdapterFolders
from lightning_odem.parameters.aligned_folders import AlignedFolders, check_same_vocabularies
from lightning_odem.parameters.folder_comparison import compare_folders
from lightning_odem.parameters.weights_shards import read_size
from lightning_odem.report.plain import plain
from lightning_odem.tasks import TaskStream

Dtype = Literal["float32", "float16", "bfloat16"]


def merge_checkpoints(
    checkpoints: list[str],
    output: str,
    method: str | MergeMethod = "average",
    base: str | None = None,
    weights: list[float] | None = None,
    tasks: list[str] | None = None,
    exclude: Sequence[str] = (),
    batch_norm: Literal["average", "keep", "recalibrate"] = "average",
    model: L.LightningModule | None = None,
    data: TaskStream | None = None,
    calibration_size: int = 1024,
    device: str = "cpu",
    dtype: Dtype | None = None,
    shard_size: str | None = None,
    overwrite: bool = False,
    adapter_into: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
) -> Merged:
    """Fold checkpoints into one, in the order given, and write it.

    Mismatches are found before the first merge. Without a ``model``, half precision is merged in fp32 and rounded at
    the end. Methods that look at one parameter at a time then read, merge and write a few tensors at a time, so that
    models may be larger than the memory; with others, one incoming model is in memory at a time. A merge that is
    killed leaves no output; run again, it goes on from what took long to compute.

    Args:
        checkpoints: Models to merge: .safetensors files, state dicts, Lightning checkpoints or folders of
            transformers, sentence-transformers or peft.
        output: A .safetensors file, beside which a Lightning checkpoint (.ckpt) is written; or a folder, if the first
            checkpoint is one. All that is not a weight then comes from the first.
        method: Merge method, or its name.
        base: The base model, if the method needs it, in any of these formats.
        weights: Utility weights; by default those of the tasks in data, else 1.
        tasks: Names of the tasks; by default those of the files.
        exclude: Patterns of tensors that are not merged: the last checkpoint's are kept, in a folder the first one's.
        batch_norm: Running statistics: average, keep (the first checkpoint's) or recalibrate.
        model: Module that computes the calibration loss; its weights do not matter.
        data: Stream with the checkpoints' tasks, found by name, or in order if it has none of the names.
        calibration_size: Samples kept for all tasks together.
        device: Where merges are computed, such as cpu or cuda:0.
        dtype: Dtype of the floating tensors that are merged and written: float32, float16 or bfloat16. By default the
            widest that each tensor has in the checkpoints.
        shard_size: Largest size of a file of weights in a folder, such as 5GB; by default there is one file.
        overwrite: Replace an output that exists.
        adapter_into: Folder of the adapters' base model. The output is then a whole model: this one, with the merged
            updates in its weights.
        rank: Rank of the merged adapter; by default the first one's.
        energy: Instead of a rank, the share in (0, 1] of each update's squared norm that the merged adapter keeps.

    Returns:
        What was merged, and where it was written.

    Raises:
        FileNotFoundError: If a checkpoint is missing.
        FileExistsError: If the output exists.
        ValueError: If models do not fit together or an argument is missing or wrong.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file, save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [f"{folder}/a.safetensors", f"{folder}/b.safetensors"]
        ...     for file, value in zip(files, [1.0, 4.0]):
        ...         save_file({"weight": torch.tensor([value])}, file)
        ...     _ = merge_checkpoints(files, f"{folder}/merged.safetensors", weights=[1.0, 2.0])
        ...     load_file(f"{folder}/merged.safetensors")
        {'weight': tensor([3.])}
    """
    method = resolve_method(method)
    names = task_names(checkpoints) if tasks is None else tasks
    check_lists(checkpoints, names, weights, exclude)
    inputs = [*checkpoints, *([] if base is None else [base])]
    adapters = find_adapters(inputs, output, model, rank, energy)
    notes = compare_folders(inputs) if adapters is None else []
    has_base = base is not None or (adapters is not None and adapters.no_update() is not None)
    check_sources(method, has_base, batch_norm, model, data)
    whole = None
    if adapter_into is not None:
        if adapters is None:
            raise ValueError(f"adapter_into is for adapters, but {checkpoints[0]} is none.")
        if dtype is not None or rank is not None or energy is not None:
            raise ValueError("adapter_into goes without dtype, rank and energy: the output is like the base model.")
        whole = AdaptedBase(adapter_into, adapters)
    place = _place(output, inputs, overwrite, adapters, shard_size, dtype, adapter_into)
    if model is not None and data is not None:
        if dtype is not None:
            raise ValueError("dtype goes without model and data: with them, the output has the dtypes of the module.")
        chosen = choose_tasks(data, names, by_name=tasks is not None)
        names = [task.task_name for task in chosen]
        weights = [task.task_weight for task in chosen] if weights is None else weights
        incoming = list(map(Incoming, checkpoints, names, weights))
        check_same_vocabularies(checkpoints, base, exclude)
        stream = FoldedStream(
            model, chosen, incoming, base, device, method, exclude, batch_norm, calibration_size=calibration_size
        )
        place.prepare()
        records = fold_in_module(stream, incoming, place, metadata_of(method, incoming, base))
        return Merged(incoming, records, place.paths, [*notes, *stream.notes], place.checked)
    incoming = list(map(Incoming, checkpoints, names, weights or [1.0] * len(names)))
    kind = None if dtype is None else getattr(torch, dtype)
    read = None
    if adapters is None:
        aligned = AlignedFolders(checkpoints, [entry.weight for entry in incoming], base, exclude)
        read = aligned.read if aligned.moved else None
        notes += aligned.notes
    files = FoldedFiles(incoming, base, device, exclude, adapters, read, kind, method=method, batch_norm=batch_norm)
    place.prepare()
    metadata = metadata_of(method, incoming, adapter_into or base)
    if adapters is not None:
        records = fold_adapters(files, place, metadata, adapters, whole)
    else:
        unfinished = files.unfinished(output, {**metadata, "exclude": list(exclude)})
        records = fold_files(files, place, metadata, unfinished)
        notes += [unfinished.note] if unfinished.note else []
    return Merged(incoming, records, place.paths, [*notes, *files.notes], place.checked)


def main(args: Sequence[str] | None = None, trusted: Sequence[str] = ()) -> None:
    """Run ``lightning-odem merge``; ``trusted`` as in :class:`~lightning_odem.cli.ContinualCLI`."""
    further = "With --into STREAM, checkpoints are folded into a stream instead: merge --into STREAM --help."
    description = f"Fold checkpoints into one, in the order given. {further}"
    parser = ArgumentParser(prog="lightning-odem merge", description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument("checkpoints", nargs="+", help="Models to merge, in order.")
    parser.add_function_arguments(merge_checkpoints, skip={"checkpoints", "overwrite", "adapter_into"}, as_group=False)
    into = "Folder of the adapters' base model; the output is this model with the merged updates in its weights."
    parser.add_argument("--adapter-into", "--adapter_into", metavar="BASE", help=into)
    parser.add_argument("--overwrite", action="store_true", help="Replace an output that exists.")
    parsed = parser.parse_args(args)
    try:
        check_class_paths(parsed, trusted)
    except UntrustedPathError as error:
        parser.error(str(error))
    given = parser.instantiate_classes(parsed)
    del given.config
    try:
        merged = merge_checkpoints(**vars(given))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(merged.table())
    lines = [*merged.notes, *([merged.checked] if merged.checked else [])]
    print(*(f"{plain(line)}\n" for line in lines), sep="", end="")
    is_file = Path(given.output).suffix == ".safetensors"
    print(f"Merged weights: {' and '.join(map(str, merged.paths)) if is_file else given.output}")


def _place(
    output: str,
    inputs: list[str],
    overwrite: bool,
    adapters: AdapterFolders | None,
    shard_size: str | None,
    dtype: Dtype | None,
    adapter_into: str | None,
) -> Output:
    """Where the merge is written: a file, or a folder like the first of the inputs."""
    size = None if shard_size is None else read_size(shard_size)
    if adapter_into is not None:
        return FolderOutput(output, [adapter_into, *inputs], overwrite, shard_size=size)
    if Path(output).suffix != ".safetensors":
        return FolderOutput(output, inputs, overwrite, adapters, size, dtype)
    if shard_size is not None:
        raise ValueError(f"shard_size={shard_size!r} divides the weights of a folder, but {output} is one file.")
    return MergeOutput(output, inputs, overwrite)

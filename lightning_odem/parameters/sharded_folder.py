"""Folders in which several processes have saved a model in shards, and the commands that make one file of them."""

import os
import shlex
from pathlib import Path

_UNPICKLES = "That runs code which the folder may hold: do it with your own checkpoints only."
_DEEPSPEED = (
    'python -c "import sys; from lightning.pytorch.utilities.deepspeed import *; '
    'convert_zero_checkpoint_to_fp32_state_dict(*sys.argv[1:])" {folder} {file}'
)
_MODEL_PARALLEL = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} {file}"
_FSDP = "python -m lightning.pytorch.utilities.consolidate_checkpoint {folder} --output_file {file}"


def refuse_sharded_folder(folder: Path) -> None:
    """Refuse a folder of shards with a message on how to convert it; any other folder passes.

    Its files are pickles, and reading them would run code from them.

    Raises:
        ValueError: If DeepSpeed or ``torch.distributed.checkpoint`` has written the folder. The message has the command
            that makes a file of it for :func:`~lightning_odem.parameters.read_checkpoint`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "zero_to_fp32.py").touch()
        ...     refuse_sharded_folder(Path(folder))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: The folder ... is a checkpoint of DeepSpeed in shards (zero_to_fp32.py). Make one file of it and ...
    """
    folder = Path(os.path.abspath(folder))  # "." has no name, and the file beside the folder is named after it
    # The shards lie in a folder within DeepSpeed's, which Lightning calls "checkpoint".
    root = folder.parent if any(folder.glob("*_model_states.pt")) else folder
    if any(root.glob("*/*_model_states.pt")) or (root / "zero_to_fp32.py").is_file():
        raise _refusal(root, "DeepSpeed", ("latest", "zero_to_fp32.py", "*/*_states.pt"), _DEEPSPEED)
    if any(folder.glob("*.distcp")):
        kind, files = "torch.distributed.checkpoint", (".metadata", "meta.pt", "*.distcp")
        if not (folder / ".metadata").is_file():
            raise ValueError(
                f"The folder {folder} is an unfinished checkpoint of {kind}: it has shards ({_found(folder, files)}) "
                "but no .metadata, which is written last. Take another one."
            )
        raise _refusal(folder, kind, files, _FSDP if _is_from_fsdp(folder) else _MODEL_PARALLEL)


def _refusal(folder: Path, kind: str, files: tuple[str, ...], command: str) -> ValueError:
    target = folder.with_name(f"{folder.stem}-whole.ckpt")
    command = command.format(folder=shlex.quote(str(folder)), file=shlex.quote(str(target)))
    return ValueError(
        f"The folder {folder} is a checkpoint of {kind} in shards ({_found(folder, files)}). Make one file of it and "
        f"give that:\n  {command}\n{_UNPICKLES}"
    )


def _found(folder: Path, patterns: tuple[str, ...]) -> str:
    """The first few of the files that tell what a folder is."""
    names = [str(path.relative_to(folder)) for pattern in patterns for path in sorted(folder.glob(pattern))]
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])])


def _is_from_fsdp(folder: Path) -> bool:
    """Whether Lightning's FSDPStrategy wrote it: with meta.pt like ModelParallelStrategy, but other tensor names."""
    return (folder / "meta.pt").is_file() and b"state_dict." not in (folder / ".metadata").read_bytes()

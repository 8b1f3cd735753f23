"""Checkpoints folded one after the other into an output, with a progress bar."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lightning_odem.cli.folded_files import FoldedFiles
from lightning_odem.cli.folded_stream import FoldedStream
from lightning_odem.cli.folder_output import FolderOutput
from lightning_odem.cli.inputs import Incoming
from lightning_odem.cli.output import MergeOutput
from lightning_odem.cli.unfinished import UnfinishedMerge
from lightning_odem.parameters.adapted_base import AdaptedBase
from lightning_odem.parameters.adapter_folders import AdapterFolders
from lightning_odem.report import MergeRecord
from lightning_odem.report.plain import plain

Output = MergeOutput | FolderOutput
"""Where a merge is written."""


def fold_in_module(
    stream: FoldedStream, incoming: Sequence[Incoming], output: Output, metadata: Mapping[str, str]
) -> list[MergeRecord]:
    """Fold checkpoints in their module, and write the merged model; returns the record of each merge."""
    records = []
    with _progress(len(incoming)) as advance:
        for number, entry in enumerate(incoming):
            records.append(stream.fold(entry, partial(_step, advance, entry.task, number)))
    state = stream.merged() if isinstance(output, FolderOutput) else stream.state()
    output.write(state, metadata, stream.hyper_parameters)
    return records


def fold_files(
    files: FoldedFiles, output: Output, metadata: Mapping[str, str], unfinished: UnfinishedMerge
) -> list[MergeRecord]:
    """Fold whole models by their tensors, and write each tensor as soon as it is merged.

    Args:
        files: The models.
        output: Where they are written.
        metadata: How the merge is made.
        unfinished: What an interrupted merge has left.
    """
    with _progress(files.size, in_bytes=True) as advance:
        excluded = {} if isinstance(output, FolderOutput) else files.excluded
        with unfinished, output.writing({**files.like, **excluded}, metadata, files.hyper_parameters) as write:
            for piece in files.merged(advance, unfinished):
                write(piece)
            write(excluded)
    return files.records


def fold_adapters(
    files: FoldedFiles,
    output: Output,
    metadata: Mapping[str, str],
    adapters: AdapterFolders,
    whole: AdaptedBase | None = None,
) -> list[MergeRecord]:
    """Fold adapters by their updates, and write an adapter.

    Args:
        files: The adapters as models.
        output: Where the result is written.
        metadata: How the merge is made.
        adapters: The adapters.
        whole: Their base model, which is written with the merged updates instead.
    """
    with _progress(files.size, in_bytes=True) as advance:
        if whole is not None:
            output.write(whole.state(files.updates(advance)), metadata, files.hyper_parameters)
        else:
            output.write(files.merged_adapter(advance), {**adapters.header, **metadata}, files.hyper_parameters)
    return files.records


def _step(advance: Callable[[str, float], None], task: str, number: int, done: int, steps: int) -> None:
    advance(task, number + done / max(steps, 1))


@contextmanager
def _progress(total: float, in_bytes: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A progress bar over checkpoints and, within each of them, over the steps of its merge; or over bytes."""
    amount = DownloadColumn() if in_bytes else TaskProgressColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        line = progress.add_task("merging", total=total)
        yield lambda what, done: progress.update(line, description=plain(f"merging {what}"), completed=done)

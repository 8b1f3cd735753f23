"""What a merge of files tells of itself: a table for the user, metadata for the files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_odem import version
from lightning_odem.cli.inputs import Incoming
from lightning_odem.methods import MergeMethod
from lightning_odem.methods.describe import describe_method
from lightning_odem.parameters.checkpoint import hash_checkpoint
from lightning_odem.report import MergeRecord
from lightning_odem.report.plain import plain


@dataclass(frozen=True)
class Merged:
    """The result of an offline merge.

    Args:
        incoming: The checkpoints in order.
        records: The record of each merge.
        paths: The files written.
        notes: What a user should know about the result, a line each.
        checked: What loading a merged folder with its library has shown, in a line.
    """

    incoming: list[Incoming]
    records: list[MergeRecord]
    paths: list[Path]
    notes: list[str] = field(default_factory=list)
    checked: str = ""

    def table(self) -> str:
        """Task, utility weight, operating time and seconds of each merge, as text."""
        table = Table("task", "weight", "t", "seconds", box=None, pad_edge=False, padding=(0, 2))
        for entry, record in zip(self.incoming, self.records, strict=True):
            table.add_row(plain(entry.task), f"{entry.weight:g}", f"{record.t:.3f}", f"{record.merge_seconds:.2f}")
        console = Console(markup=False, emoji=False, highlight=False)
        with console.capture() as captured:
            console.print(table)
        return captured.get()


def metadata_of(method: MergeMethod, incoming: Sequence[Incoming], base: str | None) -> dict[str, str]:
    """How a merge was made, for the headers of its files and the model card; all files of weights are read for it."""
    settings = describe_method(method)
    return {
        "method": settings.pop("name"),
        "settings": json.dumps(settings),
        "base": "" if base is None else str(base),
        "version": version.__version__,
        "sha256": json.dumps({entry.task: hash_checkpoint(entry.path) for entry in incoming}),
        "base_sha256": json.dumps({} if base is None else hash_checkpoint(base)),
        "tasks": json.dumps([entry.task for entry in incoming]),
        "weights": json.dumps([entry.weight for entry in incoming]),
    }

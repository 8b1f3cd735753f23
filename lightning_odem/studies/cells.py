"""Results kept in files, so that a study that is started again does only what is missing."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_odem.parameters.files import replacing
from lightning_odem.studies.display import Display


class Cell(NamedTuple):
    """A part of a study that is done at once.

    Args:
        path: File of its result; the name should follow from all that decides it.
        description: What the progress display says meanwhile.
        run: Gives the result as plain data.
    """

    path: Path
    description: str
    run: Callable[[], Any]


def run_cells(cells: Sequence[Cell], show_progress: bool) -> list[Any]:
    """Results of all cells, in order: from their files, or made and written one by one.

    Args:
        cells: The cells.
        show_progress: Show cells done and the time left.
    """
    with Display(len(cells), show_progress) as display:
        for cell in cells:
            if cell.path.exists():
                display.skip()
                continue
            display.begin(cell.description)
            text = json.dumps(cell.run(), indent=1, allow_nan=False)
            with replacing(cell.path) as draft:
                draft.write_text(text, encoding="utf-8")
            display.done()
    return [json.loads(cell.path.read_text(encoding="utf-8")) for cell in cells]

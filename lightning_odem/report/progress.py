"""A progress bar for merges that works together with the Trainer's own."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.markup import escape

from lightning_odem.report.plain import plain

# Seconds. To draw all of Rich's lines takes about as long as a step of a small model.
_BETWEEN = 0.05

Advance = Callable[[int, int], None]


@contextmanager
def progress(trainer: L.Trainer, description: str) -> Iterator[Advance]:
    """Show (done, total) of the block as a line of the Trainer's progress bar, if it has one.

    Example:
        >>> with progress(L.Trainer(enable_progress_bar=False, logger=False), "merging") as advance:
        ...     advance(1, 2)
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        display = bar.progress
        line, shown = display.add_task(escape(plain(description)), total=1), -math.inf

        def advance(done: int, total: int) -> None:
            nonlocal shown
            display.update(line, completed=done, total=total)
            if (now := time.monotonic()) - shown >= _BETWEEN:
                shown = now
                display.refresh()

        try:
            yield advance
        finally:
            display.update(line, visible=False)
            display.refresh()
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        # Below the training and validation bars.
        with Tqdm(desc=plain(description), position=2 + bar.process_position, leave=False, dynamic_ncols=True) as shown:

            def advance_below(done: int, total: int) -> None:
                shown.total, shown.n = total, done
                shown.refresh()

            yield advance_below
    else:
        yield lambda done, total: None

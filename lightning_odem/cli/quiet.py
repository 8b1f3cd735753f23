"""What Lightning and torch say to those who set up a Trainer, kept from those who use the command line."""

import logging
import warnings

REMARKS = (
    "GPU available: False",
    "TPU available: False",
    "HPU available: False",
    "💡 Tip: For seamless cloud",
    "`Trainer(limit_train_batches=1.0)` was configured",
    "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped: `max_epochs=",
    "This Trainer has trained before",
)
"""Beginnings of messages that tell what is always so here: ``fit_tasks`` fits again and again with one Trainer."""

WARNINGS = (
    r"LightningCLI's args parameter is intended to run from within Python",  # as main() does for quickstart
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    r"The '\w+' does not have many workers",  # the tasks of this package are arrays in memory by default
    r"The number of training batches \(\d+\) is smaller than the logging interval",
)
"""Patterns of warnings that no user of the command line can act on."""


class _Remarks(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(REMARKS)


_FILTER = _Remarks()


def quieten() -> None:
    """Leave out :data:`REMARKS` and :data:`WARNINGS` from now on in this process; everything else is shown."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_FILTER)  # a filter that is there already is not added again
    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", pattern)

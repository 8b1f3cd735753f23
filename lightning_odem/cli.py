"""The command line: LightningCLI, with the subcommand ``fit_tasks``."""

import os
import sys

import lightning as L
from lightning.pytorch.cli import LightningCLI

import lightning_odem  # noqa: F401 (registers the short class names that a YAML may use)
from lightning_odem.stream import TaskStream
from lightning_odem.trainer import ContinualTrainer

class ContinualCLI(LightningCLI):
    """LightningCLI with ``fit_tasks`` beside Lightning's own subcommands; every argument can come from YAML."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and ``fit_tasks``, with the parameters that are not options of theirs."""
        return {**LightningCLI.subcommands(), "fit_tasks": {"model", "datamodule"}}


def main(args: list[str] | None = None) -> ContinualCLI:
    """Run the command line; ``lightning-odem fit_tasks --help`` says what there is.

    Classes in the current directory can be named in a YAML by their path, as with ``python -m``.

    Args:
        args: Arguments instead of those of the process.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return ContinualCLI(
        L.LightningModule,
        TaskStream,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=ContinualTrainer,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        args=args,
    )

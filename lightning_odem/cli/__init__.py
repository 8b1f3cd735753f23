"""The command line, and merging of existing checkpoints."""

from lightning_odem.cli.command_line import ContinualCLI, main, run
from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.parameters.checkpoint import read_checkpoint

__all__ = ["ContinualCLI", "main", "merge_checkpoints", "read_checkpoint", "run"]

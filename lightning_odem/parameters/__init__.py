"""A module's parameters as one flat vector: shared by processes, divided between tasks, copied, read from files."""

from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.shards import Shards
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot, undisturbed
from lightning_odem.parameters.task_parameters import OwnParameters, as_task, put_task_parameters
from lightning_odem.parameters.vector import ParameterVector, canonical_name, is_excluded
from lightning_odem.parameters.weights_file import load_weights

__all__ = [
    "Division",
    "OwnParameters",
    "ParameterVector",
    "Processes",
    "Shards",
    "Snapshot",
    "as_task",
    "canonical_name",
    "is_excluded",
    "load_snapshot",
    "load_weights",
    "put_task_parameters",
    "read_checkpoint",
    "take_snapshot",
    "undisturbed",
]

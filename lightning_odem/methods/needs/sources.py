"""What a need sees: the training of an incoming model, and what is available when a merge starts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.parameters.vector import ParameterVector

if TYPE_CHECKING:
    from lightning_odem.methods.needs.need import Need

from collections.abc import Callable

import lightning as L


@dataclass(frozen=True)
class TrainingRun:
    """One fit, from which a need may collect something.

    Args:
        trainer: The Trainer, with its optimizers set up.
        module: The module that is trained.
        method: Name of the merge method, for errors.
        select: Which parameters are trained and merged, by name.
    """

    trainer: L.Trainer
    module: L.LightningModule
    method: str
    select: Callable[[str], bool]


@dataclass(frozen=True)
class Offer:
    """Which sources a merge has, known before it starts.

    Args:
        base: Whether there is a base model.
        calibration: Whether there are calibration samples and a loss.
        batches: Whether the incoming task's training batches are available.
        collected: What needs collected during the incoming model's training, by their class.
    """

    base: bool = False
    calibration: bool = False
    batches: bool = False
    collected: "Mapping[type[Need[Any]], Any]" = field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """The sources from which a need is built.

    The module holds the incoming model, including its batch-norm statistics. It is in eval mode. A need
    leaves it unchanged in the end.

    Args:
        module: The module; it is attached to a Trainer if there are losses.
        vector: Its merged parameters.
        layers: Linear layers and convolutions with the name of their weight, see
            :func:`~lightning_odem.parameters.linear_layers`.
        task: Name of the incoming task.
        base: Parameters and buffers of the base model by name.
        calibration: Samples and loss, or None.
        batches: The incoming task's training batches, one epoch per iteration, or None.
        collected: What needs collected during the incoming model's training, by their class.
    """

    module: nn.Module
    vector: ParameterVector
    layers: Mapping[nn.Module, str]
    task: str
    base: Mapping[str, Tensor]
    calibration: CalibrationSet | None
    batches: Iterable[Any] | None
    collected: "Mapping[type[Need[Any]], Any]"

"""A module's own loss on calibration samples."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_odem.calibration.batches import count, each
from lightning_odem.calibration.samples import MicroBatch
from lightning_odem.parameters.attributes import Attributes


class ModuleLoss:
    """Mean loss of a micro-batch by the module's ``calibration_step(batch, task)``, else by its ``training_step``.

    Batches go to the device through the module's and datamodule's own transfer hooks and run under the Trainer's
    precision. While ``training_step`` is used for this, the module's ``log`` and ``log_dict`` and the Trainer's loggers
    do nothing, and afterwards the module's attributes are what they were: losses kept in a list, counters, metrics.

    Args:
        module: The module, attached to its Trainer.

    Raises:
        TypeError: If a module that optimises manually has no ``calibration_step``: its ``training_step`` would change
            the weights.
    """

    def __init__(self, module: L.LightningModule) -> None:
        if not hasattr(module, "calibration_step") and not module.automatic_optimization:
            raise TypeError(
                f"{type(module).__name__} optimises manually, so its training_step cannot serve as the calibration "
                "loss. Give it a method calibration_step(batch, task) that returns the mean loss of a batch."
            )
        self._module = module
        self._step = getattr(module, "calibration_step", None)
        self._metrics = [submodule for submodule in module.modules() if isinstance(submodule, Metric)]

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Mean loss of the batch, a scalar.

        Raises:
            TypeError: If the step returns something other than a scalar tensor or a dictionary with one under "loss".
        """
        total = count(batch.samples)
        losses = []
        for part, index in batches_on_device(self._module, batch):
            loss = self._loss(part, batch.task)
            losses.append(loss if isinstance(index, slice) else loss * (len(index) / total))
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _loss(self, samples: Any, task: str) -> Tensor:
        with self._module.trainer.precision_plugin.forward_context():
            if self._step is not None:
                result: Any = self._step(samples, task)
            else:
                result = _without_trace(self._module, self._metrics, training_step_on, self._module, samples)
        loss = result.get("loss") if isinstance(result, dict) else result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"The calibration loss of {type(self._module).__name__} on task {task!r} must be a scalar "
                f"tensor, or a dictionary with one under 'loss'; got {type(result).__name__}."
            )
        return loss.reshape(())


def batches_on_device(module: L.LightningModule, batch: MicroBatch) -> Iterator[tuple[Any, slice | Tensor]]:
    """The samples of a micro-batch on the module's device, for its steps to use as they use a dataloader's batch.

    Samples that a dataloader would not put in one batch come in several, each with the indices of its samples.
    """
    for part, index in each(batch.samples):
        yield move_to_device(module, part, batch.transferred), index


def move_to_device(module: L.LightningModule, batch: Any, transferred: bool = False) -> Any:
    """Bring a batch to the module's device and precision as Lightning's loops do.

    The batch-transfer hooks of module and datamodule apply, unless the batch went through them before.
    """
    trainer = module.trainer
    batch = trainer.precision_plugin.convert_input(batch)
    if transferred:
        return module.transfer_batch_to_device(batch, module.device, 0)
    return trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch))


def training_step_on(module: L.LightningModule, batch: Any) -> Any:
    """Call ``training_step`` with the arguments that Lightning's loop would give it."""
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return module.training_step(iter([(batch, 0, 0)]))
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return module.training_step(batch, 0) if takes_index else module.training_step(batch)


def _without_trace(
    module: L.LightningModule, metrics: Sequence[nn.Module], function: Callable[..., Any], *args: Any
) -> Any:
    """Call a step of the module whose logging is mute, and whose attributes are what they were afterwards."""
    # Lightning refuses log() outside its loops; what a calibration pass would log is not a training result anyway.
    trainer, loggers = module.trainer, module.trainer.loggers
    # Sums of metrics are put back after the pass; their lists would grow meanwhile.
    attributes = Attributes((module, *metrics), tensors=False)
    for name in ("log", "log_dict"):
        module.__dict__[name] = lambda *args, **kwargs: None
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        return function(*args)
    finally:
        trainer.loggers = loggers
        attributes.put_back()

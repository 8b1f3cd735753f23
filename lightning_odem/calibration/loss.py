"""A module's own loss on calibration samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torchmetrics import Metric

from lightning_odem.calibration.batches import LABEL_KEYS, each
from lightning_odem.calibration.objective import Counted
from lightning_odem.calibration.samples import MicroBatch
from lightning_odem.parameters.attributes import Attributes

# The labels that torch's and Hugging Face's losses leave out of their means.
_IGNORED = -100


class ModuleLoss:
    """Mean loss of a micro-batch by the module's ``calibration_step(batch, task)``, or else by its ``training_step``.

    ``calibration_step`` may return ``(loss, count)`` if the loss is a mean over tokens, masks or pairs instead of
    samples. A micro-batch then counts by its number of these, and one without any does not count.

    Batches go to the device through the transfer hooks of module and datamodule. They run under the Trainer's
    precision. While ``training_step`` runs, the module's ``log`` and ``log_dict`` and the Trainer's loggers do nothing.
    Afterwards the module's attributes, such as lists of losses, counters and metrics, are what they were.

    The module is in eval mode. If its ``training_step`` gives a loss in training mode only, as torchvision's detectors
    do, it is called in that mode, with norm and dropout layers in eval mode and the same random numbers each time.

    Args:
        module: The module, attached to its Trainer.

    Attributes:
        joins_tasks: Whether a batch may have samples of several tasks, since the step is not told the task.

    Raises:
        TypeError: If a module that optimises manually has no ``calibration_step``. Its ``training_step`` would change
            the parameters.
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
        self._in_training: bool | None = None  # found out on the first batch
        self.joins_tasks = self._step is None

    def __call__(self, batch: MicroBatch) -> Tensor | Counted:
        """Mean loss of the batch, a scalar; with its count if the module gives one.

        If all labels are ignored and the loss is not finite, the batch does not count.

        Raises:
            TypeError: If the step returns something other than a scalar tensor, a dictionary with one under "loss", or
                a pair of these and a count.
            ValueError: If the count is negative or not finite.
        """
        found, sizes = [], []
        for part, index in each(batch.samples):
            is_empty = _has_no_target(part)  # read on the CPU, without waiting for a device
            loss = self._loss(move_to_device(self._module, part, batch.transferred), batch.task)
            if is_empty and not isinstance(loss, Counted) and not loss.isfinite():
                loss = Counted(loss, 0.0)
            found.append(loss)
            sizes.append(1 if isinstance(index, slice) else len(index))
        return found[0] if len(found) == 1 else _mean(found, sizes)

    def _loss(self, samples: Any, task: str) -> Tensor | Counted:
        with self._module.trainer.precision_plugin.forward_context():
            if self._step is not None:
                return self._read(self._step(samples, task), task)
            first: Exception | None = None
            for in_training in (False, True) if self._in_training is None else (self._in_training,):
                try:
                    with _training(self._module) if in_training else nullcontext():
                        result = _without_trace(self._module, self._metrics, training_step_on, self._module, samples)
                        found = self._read(result, task)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    first = first or error
                else:
                    self._in_training = in_training
                    return found
            assert first is not None, "there is no other way out of the loop"
            raise first

    def _read(self, result: Any, task: str) -> Tensor | Counted:
        number = None
        if type(result) in (tuple, list) and len(result) == 2 and self._step is not None:
            result, number = result
        loss = result.get("loss") if isinstance(result, dict) else result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"The calibration loss of {type(self._module).__name__} on task {task!r} must be a scalar "
                f"tensor, or a dictionary with one under 'loss'; got {type(result).__name__}."
            )
        if number is None:
            return loss.reshape(())
        if not (math.isfinite(number := float(number)) and number >= 0):
            raise ValueError(
                f"calibration_step of {type(self._module).__name__} returned a loss with the count {number}; "
                "the count is 0 or a positive number."
            )
        return Counted(loss.reshape(()), number)


@contextmanager
def _training(module: nn.Module) -> Iterator[None]:
    """Put a module in training mode, except for layers whose outputs would be random or depend on the batch.

    Random numbers are the same each time, since a loss should depend on the point alone.
    """
    others = [each for each in module.modules() if not (each.training or isinstance(each, (_NormBase, _DropoutNd)))]
    with isolate_rng():
        torch.manual_seed(0)
        for submodule in others:
            submodule.training = True
        try:
            yield
        finally:
            for submodule in others:
                submodule.training = False


def _mean(losses: Sequence[Tensor | Counted], sizes: Sequence[int]) -> Tensor | Counted:
    """The loss of several batches: the mean by count if all are counted, otherwise by number of samples."""
    counted = [loss for loss in losses if isinstance(loss, Counted)]
    if len(counted) == len(losses):
        total = math.fsum(loss.count for loss in counted)
        parts = [loss.loss * (loss.count / total) for loss in counted if loss.count]
        return Counted(torch.stack(parts).sum() if parts else counted[0].loss, total)
    # Batches without a target do not count.
    pairs = [(loss, size) for loss, size in zip(losses, sizes, strict=True) if not isinstance(loss, Counted)]
    total = sum(size for _, size in pairs)
    return torch.stack([loss * (size / total) for loss, size in pairs]).sum()


def _has_no_target(batch: Any) -> bool:
    """Whether all labels of a batch are the one that torch's losses ignore; the first of each sequence may differ."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, Sequence):
        found = batch[1] if len(batch) > 1 else None
    else:
        found = next((getattr(batch, key) for key in LABEL_KEYS if hasattr(batch, key)), None)
    if not isinstance(found, Tensor) or found.is_floating_point() or not found.dim() or not found.numel():
        return False
    if found[(-1,) * found.dim()].item() != _IGNORED:  # true of almost all batches
        return False
    return bool((found == _IGNORED).all() or (found.dim() > 1 and (found[:, 1:] == _IGNORED).all()))


def batches_on_device(module: L.LightningModule, batch: MicroBatch) -> Iterator[tuple[Any, slice | Tensor]]:
    """The samples of a micro-batch on the module's device, as the module's steps get a dataloader's batch.

    There are several batches if a dataloader would not put the samples in one. Each comes with the indices of its
    samples.
    """
    for part, index in each(batch.samples):
        yield move_to_device(module, part, batch.transferred), index


def move_to_device(module: L.LightningModule, batch: Any, transferred: bool = False) -> Any:
    """Bring a batch to the module's device and precision as Lightning's loops do.

    The batch-transfer hooks of module and datamodule apply, unless ``transferred`` says that the batch went through
    them before.
    """
    trainer = module.trainer
    batch = trainer.precision_plugin.convert_input(batch)
    if transferred:
        return module.transfer_batch_to_device(batch, module.device, 0)
    return trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch))


def training_step_on(module: L.LightningModule, batch: Any) -> Any:
    """Call ``training_step`` with the arguments that Lightning's loop would give it."""
    step = module.training_step
    takes_index, takes_iterator = _arguments(getattr(step, "__func__", step))
    if takes_iterator:
        return step(iter([(batch, 0, 0)]))
    return step(batch, 0) if takes_index else step(batch)


@lru_cache(maxsize=8)
def _arguments(step: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a step takes the batch's index, and whether it takes an iterator; cached, as every micro-batch asks."""
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return takes_index, is_param_in_hook_signature(step, "dataloader_iter", explicit=True)


def _without_trace(
    module: L.LightningModule, metrics: Sequence[nn.Module], function: Callable[..., Any], *args: Any
) -> Any:
    """Call a step of the module without logging; the module's attributes are restored afterwards."""
    # Lightning refuses log() outside its loops, and a calibration pass has no training results to log.
    trainer, loggers = module.trainer, module.trainer.loggers
    # Tensors of metrics are restored after the whole pass. Their lists would grow during it.
    attributes = Attributes((module, *metrics), tensors=False)
    for name in ("log", "log_dict"):
        module.__dict__[name] = lambda *args, **kwargs: None
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        return function(*args)
    finally:
        trainer.loggers = loggers
        attributes.put_back()

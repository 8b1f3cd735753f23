"""A merge's passes on a few samples, before a training whose merge would fail."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_odem.calibration.sample_collector import SampleCollector
from lightning_odem.parameters.snapshot import undisturbed
from lightning_odem.parameters.task_parameters import explaining_shapes
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.stream.store import encode
from lightning_odem.stream.stream import Stream

_CLASS_LOSSES = (F.cross_entropy, F.nll_loss)


def rehearse(stream: Stream, module: nn.Module, sampling: SampleCollector) -> None:
    """Run the calibration loss on two samples of a task and of each earlier one; the module stays as it is.

    So a module without a loss is refused before training, and one that cannot use the parameters of earlier tasks any
    more. Samples that could not be saved after the merge are refused too, and labels for which the loss has no class.

    Args:
        stream: The stream; a task is started.
        module: The module, attached to a Trainer.
        sampling: The samples of the task. Nothing is done if they are collected from the training batches.

    Raises:
        ValueError: If the loss has no gradient, or a sample cannot be kept, or there is no class for a label. Errors of
            the module's own code pass.
    """
    pair, task = sampling.pair(), stream.state.started["task"]
    if pair is None:
        return
    encode(pair.state_dict(), "calibration")
    with undisturbed(module):
        vector = ParameterVector(module, stream.division.patterns(module))
        calibration = stream.measured_on(module, pair)
        with ClassLabels(task) as labels:
            calibration.store_logits(task)
            calibration.objective(vector).loss_and_grad(vector.read())
            if (doubtful := sampling.some(labels.outside)) is not None:
                calibration = stream.measured_on(module, doubtful)
                calibration.store_logits(task)
                calibration.objective(vector).loss(vector.read())
        buffer = stream.state.buffer
        objective = stream.measured_on(module, buffer).objective(vector)
        for name in [name for name, held in buffer.counts.items() if held]:
            with explaining_shapes(module, name, stream.state.task_parameters.get(name, {})):
                objective.losses(vector.read(), [next(buffer.micro_batches_of(name, 2))])


class LabelOutsideError(ValueError, IndexError):
    """A label for which there is no class; torch itself raises an ``IndexError``."""


class ClassLabels(TorchFunctionMode):
    """Refuses, while it is active, a label for which a cross-entropy has no class.

    The labels are those that the loss gets, whatever the module makes of those of its samples, and ``ignore_index`` is
    the loss's own. So labels that the module maps or ignores pass. Without this check, labels outside the classes are
    an ``IndexError`` without a name on the CPU, and end the process on a GPU.

    Args:
        task: Name of the task, for the error.

    Attributes:
        classes: Number of classes of the losses seen so far that get one label per sample; None if there was none.

    Example:
        >>> with ClassLabels("digits") as labels:
        ...     loss = F.cross_entropy(torch.zeros(2, 10), torch.tensor([3, -100]))
        >>> labels.classes
        10
    """

    def __init__(self, task: str) -> None:
        super().__init__()
        self._task = task
        self.classes: int | None = None

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CLASS_LOSSES:
            self._check(*args, **kwargs)
        return func(*args, **kwargs)

    def outside(self, labels: Tensor) -> Tensor:
        """Indices of one sample per label [n] for which the losses seen have no class."""
        if self.classes is None:
            return torch.zeros(0, dtype=torch.long)
        labels = labels.long()
        unknown = labels[(labels < 0) | (labels >= self.classes)].unique()
        return (labels == unknown[:, None]).long().argmax(1)

    def _check(self, input: Tensor, target: Tensor, *_: Any, ignore_index: int = -100, **__: Any) -> None:
        if target.is_floating_point():  # probabilities
            return
        classes = input.shape[min(input.dim() - 1, 1)]
        outside = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
        if len(outside):
            label = outside[0].item()
            raise LabelOutsideError(
                f"Target {label} is out of bounds: task {self._task!r} has a training sample of label {label}, but the "
                f"module's loss has {classes} classes (labels 0 to {classes - 1}). Give the module as many outputs as "
                "there are classes, or number the labels from 0."
            )
        if target.dim() == 1:
            self.classes = min(classes, self.classes or classes)

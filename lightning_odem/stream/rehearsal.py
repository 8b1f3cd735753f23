"""A merge's passes on a few samples, before a training whose merge would fail."""

from torch import nn

from lightning_odem.calibration.sample_collector import SampleCollector
from lightning_odem.parameters.snapshot import undisturbed
from lightning_odem.parameters.task_parameters import explaining_shapes
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.stream.class_labels import ClassLabels
from lightning_odem.stream.store import encode
from lightning_odem.stream.stream import Stream


def rehearse(stream: Stream, module: nn.Module, sampling: SampleCollector) -> None:
    """Run the calibration loss on two samples of a task and of each earlier one; the module stays as it is.

    A module without a loss is refused so before training, and one that cannot use the parameters of earlier tasks any
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

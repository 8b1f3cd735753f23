"""Averaging followed by fine-tuning on the calibration set: what Algorithm 1's gradients achieve without its flow."""

import math
from itertools import chain

import torch
from torch import Tensor

from lightning_odem.arguments import check_integer, check_range, check_seed, check_step
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.needs import Calibration


class ReplayMerge(MergeMethod):
    r"""The running average, fine-tuned with Adam on the calibration set: a control for methods that use that set.

    Algorithm 1 takes :math:`\lceil t / h \rceil` gradients on the whole set; this method takes as many epochs of random
    minibatches of the same samples, see :meth:`~lightning_odem.calibration.CalibrationBuffer.minibatches`. Both use the
    same labelled samples and the same number of sample gradients, so neither data nor cost explains a difference
    between their accuracies. The result need not lie near the path between the two models.

    Adam starts afresh with every merge. Four vectors are held besides the incoming model: the point, one gradient and
    Adam's two moments. A step briefly takes one more. At t = 1 the method fine-tunes the incoming model.

    Args:
        lr: Adam's learning rate; not tuned. Adam moves a weight by about this much per step at most, so by 0.016 in the
            160 steps that a merge takes at t = 1/2 with 1024 samples. Its usual 0.001 would allow ten times that, which
            is larger than most weights of a pretrained network.
        batch_size: Samples per minibatch; also bounds the memory of a pass.
        step_size: Step length h in (0, 1] of the Algorithm 1 run whose cost is matched; 0.05 is the default there.
        seed: Seed of the minibatches; each merge starts from it.

    Raises:
        ValueError: For an argument out of its range.
    """

    needs = (Calibration(),)

    def __init__(self, lr: float = 1e-4, batch_size: int = 64, step_size: float = 0.05, seed: int = 0) -> None:
        self.lr = check_range("lr", lr, 0, open_low=True)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.step_size = check_step("step_size", step_size)
        self.seed = check_seed("seed", seed)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Interpolate and fine-tune in the memory of ``merged``.

        Raises:
            NonFiniteLossError: If the loss or a weight becomes infinite or NaN.
        """
        buffer = context[Calibration].buffer
        epochs = math.ceil(t / self.step_size * (1.0 - 1e-12))  # the number of steps of Algorithm 1
        steps = epochs * math.ceil(len(buffer) / self.batch_size)
        theta = merged.lerp_(incoming, t)
        optimizer = torch.optim.Adam([theta], lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        minibatches = chain.from_iterable(buffer.minibatches(self.batch_size, generator) for _ in range(epochs))
        for step, minibatch in enumerate(minibatches):
            if context.on_step:
                context.on_step(step, steps)
            loss, theta.grad = context[Calibration].loss_and_grad(theta, minibatch)
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"the calibration loss is {loss}", step, t)
            optimizer.step()
            # Free the gradient before the next one comes, so that one vector less is held.
            optimizer.zero_grad()
        if not theta.isfinite().all():
            raise NonFiniteLossError("a weight is not finite", steps, t)
        if context.on_step:
            context.on_step(steps, steps)
        return MergeResult(theta)

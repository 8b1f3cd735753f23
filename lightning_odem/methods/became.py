"""The operating time of BECAME: the minimum, between two models, of a quadratic model of all tasks' losses."""

import math
from collections.abc import Callable

from torch import Tensor

from lightning_odem.calibration.objective import CalibrationObjective
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods.linalg import exact, exact_sum, total

# Samples per squared gradient. Fewer samples come closer to the Fisher information and take more passes.
_SAMPLES = 16
_PIECE = 1 << 20


def laplace_time(t: float, old: float, new: float) -> float:
    r"""Minimum of a sum of two parabolas, :math:`a^* = t q_1 / (t q_1 + (1 - t) q_0)`.

    On the segment :math:`\theta_0 + a d` with :math:`d = \theta_1 - \theta_0` the losses of the earlier tasks are
    :math:`q_0 a^2 / 2`, lowest at the merged model. The loss of the new task is :math:`q_1 (1 - a)^2 / 2`, lowest at
    the incoming model. Utility weights multiply the losses; the new task's weight is t of the sum. The minimum is t if
    both parabolas are equally curved, or flat. It is 0 for t = 0 and 1 for t = 1.

    Args:
        t: Operating time of the utility weights in [0, 1].
        old: :math:`q_0 \ge 0`, curvature of the earlier tasks' mean loss along d.
        new: :math:`q_1 \ge 0`, curvature of the new task's loss along d.

    Example:
        >>> laplace_time(0.5, old=3.0, new=1.0), laplace_time(0.2, old=2.0, new=2.0)
        (0.25, 0.2)
    """
    total = t * new + (1.0 - t) * old
    return t * new / total if total > 0.0 and 0.0 < t < 1.0 else t


def became_time(
    objective: CalibrationObjective,
    merged: Tensor,
    incoming: Tensor,
    t: float,
    sum_: Callable[[Tensor], None] | None = None,
) -> float:
    r"""BECAME's merging coefficient as an operating time (Li et al., ICML 2025, arXiv 2504.02666).

    The posterior of the earlier tasks is approximated by a Gaussian around the merged model, that of the new task by a
    Gaussian around the incoming model. On the segment between the models, :math:`d = \theta_1 - \theta_0`, the loss of
    all tasks is then lowest at

    .. math::
        a^* = \frac{w_k\, d^\top F_k(\theta_1)\, d}
        {w_k\, d^\top F_k(\theta_1)\, d + \sum_{j<k} w_j\, d^\top F_j(\theta_0)\, d}, \qquad
        d^\top F_j d = \sum_i d_i^2 \frac{1}{n_j} \sum_{b} \Big(\sum_{x \in b} \partial_i \ell_j(x)\Big)^2,

    with minibatches b of 16 of the task's :math:`n_j` calibration samples. F is the diagonal Fisher information.

    This is a reconstruction, not a reproduction; ``docs/methods.md`` has the differences from the paper. It costs one
    gradient on each calibration sample. The only vector held is one gradient.

    Args:
        objective: The calibration loss. The task that entered its buffer last counts as the incoming one.
        merged: :math:`\theta_0`, shape [d].
        incoming: :math:`\theta_1`, shape [d].
        t: Operating time of the utility weights. 0 and 1 stay what they are.
        sum_: Sums numbers over the shards in place if the vectors are shards.

    Raises:
        ValueError: If there is no earlier task that has samples and a weight.
        NonFiniteLossError: If a gradient is not finite.
    """
    if t in (0.0, 1.0):
        return t
    weights = {task: held["weight"] for task, held in objective.buffer.state_dict()["tasks"].items()}
    new = list(weights)[-1]
    old = {task: weights[task] for task, n in objective.buffer.counts.items() if task != new and n and weights[task]}
    if not old:
        raise ValueError(
            f"operating_time='became' compares the new task with earlier ones, but the calibration buffer holds "
            f"samples of {', '.join(weights)} alone that count. Give every task samples, or take 'utility'."
        )
    mean = math.fsum(w * _curvature(objective, task, merged, merged, incoming, sum_) for task, w in old.items())
    mean /= math.fsum(old.values())
    return laplace_time(t, mean, _curvature(objective, new, incoming, merged, incoming, sum_))


def _curvature(
    objective: CalibrationObjective,
    task: str,
    at: Tensor,
    start: Tensor,
    end: Tensor,
    sum_: Callable[[Tensor], None] | None,
) -> float:
    """d^T F d of one task, with F at a point and d from ``start`` to ``end``."""
    samples = objective.buffer.counts[task]
    # A micro-batch's share is its part of the task's samples, so this gradient is a sum over samples divided by n.
    gradients = (objective.loss_and_grad(at, [batch])[1] for batch in objective.buffer.micro_batches_of(task, _SAMPLES))
    curvature = samples * total(math.fsum(_weighted_square(gradient, start, end) for gradient in gradients), sum_)
    if not math.isfinite(curvature):
        raise NonFiniteLossError(f"the curvature of task {task!r}, so a gradient or a weight, is {curvature}", 0, 0.0)
    return curvature


def _weighted_square(gradient: Tensor, start: Tensor, end: Tensor) -> float:
    """Sum of (d_i g_i)^2, in fp64 and piece by piece."""
    pieces = zip(*(vector.split(_PIECE) for vector in (gradient, start, end)), strict=True)
    return exact_sum((exact(b - a) * exact(g)).square().sum() for g, a, b in pieces)

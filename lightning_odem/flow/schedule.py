"""When to stop: the operating time of each merge (Section 3.4 of the paper)."""

import math
from collections.abc import Sequence


def operating_time(weights: Sequence[float]) -> float:
    """Operating time of the last task in ``weights``, t_k = w_k / (w_1 + ... + w_k) (eq. 18).

    The first task has no other task to share with, so its time is 1 whatever its weight is (Psi_1 = psi_1 in Algorithm
    1). A later task of weight 0 has time 0 and leaves the merged model untouched.

    Args:
        weights: Utility weights w_1, ..., w_k of the tasks merged so far, the incoming one last; dimensionless.

    Raises:
        ValueError: If there is no weight, or one is negative or not finite.

    Example:
        >>> [operating_time([1.0] * k) for k in (1, 2, 4)]
        [1.0, 0.5, 0.25]
        >>> operating_time([1.0, 3.0]), operating_time([1e308, 1e308])
        (0.75, 0.5)
    """
    if not weights:
        raise ValueError("An operating time needs at least one utility weight, got none.")
    for index, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"Utility weights must be finite and non-negative, got {weight} for task {index + 1}.")
    if len(weights) == 1:
        return 1.0
    if not weights[-1]:
        return 0.0
    total = sum(weights)
    if math.isinf(total):  # the sum of finite weights overflows; divided by the largest it does not
        largest = max(weights)
        return weights[-1] / largest / sum(weight / largest for weight in weights)
    return weights[-1] / total


def scaled_time(t: float, factor: float) -> float:
    r"""The operating time of a task if its utility weight were ``factor`` times as large, :math:`ct / (ct + 1 - t)`.

    It is 0 at t = 0 and 1 at t = 1 for any factor. So a task without weight stays one, and a task that alone has a
    weight stays one.

    Args:
        t: Operating time in [0, 1].
        factor: c > 0.

    Example:
        >>> weights = [1.0, 1.0, 0.5]
        >>> scaled_time(operating_time(weights), 2.0) == operating_time([1.0, 1.0, 1.0])
        True
        >>> [scaled_time(t, 2.0) for t in (0.0, 0.5, 1.0)]
        [0.0, 0.6666666666666666, 1.0]
    """
    return factor * t / (factor * t + (1.0 - t))

"""Search for the lowest point of a loss along a ray, by a bracket and a parabola."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Bracket:
    r"""The minimum over a positive scale, in few evaluations.

    The search tries scales at a constant ratio. It begins at ``start`` and its two neighbours and goes downhill until
    the lowest of three is in the middle. The minimum is that of the parabola through these three in
    :math:`\log \lambda`. A loss that is not finite counts as infinite.

    Args:
        loss: The loss at a scale.
        start: The scale to begin with, above 0.
        ratio: Ratio of neighbouring scales.
        most: Largest number of evaluations. If they do not give a bracket, the best scale tried is taken; 1 takes
            ``start``.

    Attributes:
        scales: The scales tried, in the order of the evaluations.
        losses: The losses there.
        lowest: The scale of the minimum.

    Example:
        >>> import math
        >>> bracket = Bracket(lambda scale: (math.log(scale) - 1.0) ** 2, start=1.0)
        >>> round(bracket.lowest, 6), len(bracket.scales)
        (2.718282, 5)
    """

    loss: Callable[[float], float]
    start: float
    ratio: float = 2**0.5
    most: int = 8
    scales: list[float] = field(default_factory=list, init=False)
    losses: list[float] = field(default_factory=list, init=False)
    lowest: float = field(init=False)

    def __post_init__(self) -> None:
        found: dict[int, float] = {}

        def at(power: int) -> float:
            if power not in found:
                value = self.loss(scale := self.start * self.ratio**power)
                found[power] = value if math.isfinite(value) else math.inf
                self.scales.append(scale)
                self.losses.append(found[power])
            return found[power]

        middle = 0
        at(0)
        while len(found) < self.most:
            if at(middle + 1) < at(middle):
                middle += 1
            elif at(middle - 1) < at(middle):
                middle -= 1
            else:
                break
        best = min(found, key=found.__getitem__)  # of equal ones the first tried
        self.lowest = self.start * self.ratio ** (best + _vertex(*(found.get(best + side) for side in (-1, 0, 1))))


def _vertex(left: float | None, middle: float | None, right: float | None) -> float:
    """Position in [-1, 1] of the lowest point of the parabola through three points; 0 if they do not bracket it."""
    if left is None or middle is None or right is None:
        return 0.0
    curvature = left - 2.0 * middle + right
    if not (math.isfinite(curvature) and curvature > 0.0):
        return 0.0
    return min(max((left - right) / (2.0 * curvature), -1.0), 1.0)

"""Results whose numbers are still on a device, so that several can be read at once."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
S = TypeVar("S")


class Deferred(Generic[T]):
    """A result that the host makes of a few numbers on a device.

    A device works ahead of the host until the host reads a number. :func:`fetch` reads the numbers of several results
    at once, so that the host waits once.

    Args:
        numbers: The numbers [n], floating point, on any device.
        finish: Makes the result of the numbers, which it gets on the CPU in fp64.

    Example:
        >>> mean = Deferred(torch.tensor([1.0, 2.0]), lambda numbers: numbers.mean().item())
        >>> largest = Deferred(torch.tensor([3.0]), lambda numbers: numbers.max().item())
        >>> fetch(mean, largest)
        >>> mean.result(), largest.result()
        (1.5, 3.0)
    """

    def __init__(self, numbers: Tensor, finish: Callable[[Tensor], T]) -> None:
        self._numbers, self._finish = numbers, finish
        self._is_read = not len(numbers)

    @classmethod
    def of(cls, value: "float | Tensor | Deferred[float]") -> "Deferred[float]":
        """Defer a number. If it is in a tensor, it is not read yet."""
        if isinstance(value, Deferred):
            return value
        if isinstance(value, Tensor):
            return Deferred(value.detach().reshape(1), lambda numbers: numbers.item())
        return Deferred(torch.empty(0), lambda numbers: float(value))

    def then(self, function: Callable[[T], S]) -> "Deferred[S]":
        """Defer what a function makes of the result."""
        return Deferred(self._numbers, lambda numbers: function(self._finish(numbers)))

    def followed_by(self, number: Tensor, finish: "Callable[[T, float], T]") -> "Deferred[T]":
        """Give this result to ``finish`` together with one more number on the device."""
        more = wide(number.detach().reshape(1))
        numbers = torch.cat([wide(self._numbers).to(more.device), more])
        return Deferred(numbers, lambda found: finish(self._finish(found[:-1]), found[-1].item()))

    def result(self) -> T:
        """The result, to be asked for once; its numbers are read from the device if they have not been."""
        fetch(self)
        return self._finish(self._numbers)

    def __float__(self: "Deferred[float]") -> float:
        return self.result()


def fetch(*results: Deferred) -> None:
    """Read the numbers of several results from their device, in one transfer."""
    waiting = [each for each in results if not each._is_read]
    if not waiting:
        return
    device = waiting[-1]._numbers.device
    together = torch.cat([wide(each._numbers).to(device) for each in waiting]).cpu().double()
    for each, numbers in zip(waiting, together.split([len(each._numbers) for each in waiting]), strict=True):
        each._numbers, each._is_read = numbers, True


class GradientOverflowError(FloatingPointError):
    """A gradient overflowed in fp16; it has to be taken again, of a loss that is scaled less.

    Args:
        again: Takes loss and gradient again.
    """

    def __init__(self, again: Callable[[], tuple[Deferred[float], Tensor]]) -> None:
        super().__init__("the gradient overflowed")
        self.again = again


def settle(loss_and_grad: Callable[[], tuple[float | Tensor | Deferred[float], Tensor]]) -> tuple[float, Tensor]:
    """Take loss and gradient, and take them again for as long as the gradient overflows."""
    while True:
        loss, grad = loss_and_grad()
        try:
            return Deferred.of(loss).result(), grad
        except GradientOverflowError as overflow:
            del grad  # so that it is not held beside the next one
            loss_and_grad = overflow.again


def wide(vector: Tensor) -> Tensor:
    """A vector in fp64, or in fp32 on Apple's GPU, which has no fp64."""
    return vector.to(torch.float32 if vector.device.type == "mps" else torch.float64)

"""The sum of the gradients of several backward passes, in one flat vector."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_odem.parameters.shards import local


class GradientSum:
    """Adds the gradients of every ``backward`` to pieces of a flat vector, until it is closed.

    Autograd adds a gradient in place where there is one already. So ``.grad`` of the parameters are the pieces, and no
    gradient takes memory for longer than it takes to add it. Where a gradient cannot be added like this, because the
    parameter has another dtype or device than the vector or is a shard, a hook adds and frees it. This works wherever
    ``backward`` works, including re-entrant activation checkpointing.

    Args:
        parameters: The parameters. Their ``.grad`` are restored at the end.
        pieces: For each of them the part of the vector, in the parameter's shape.
        others: Further parameters that a loss may depend on; their gradients are freed.
        scales: Factors on the gradients of parameters that are shards, by parameter; 1 for those that are missing.

    Example:
        >>> import torch
        >>> weight, total = torch.nn.Parameter(torch.ones(2)), torch.zeros(2)
        >>> gradients = GradientSum([weight], [total])
        >>> for slope in (1.0, 2.0):
        ...     (slope * weight).sum().backward()
        >>> gradients.close()
        >>> total, gradients.is_reached, weight.grad
        (tensor([3., 3.]), True, None)
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        pieces: Sequence[Tensor],
        others: Sequence[Tensor] = (),
        scales: Mapping[Tensor, float] = {},  # noqa: B006
    ) -> None:
        self._before = [(parameter, parameter.grad) for parameter in (*parameters, *others)]
        self._pairs = list(zip(parameters, pieces, strict=True))
        self._versions = [piece._version for piece in pieces]
        self._scales = scales
        self._in_place = [pair for pair in self._pairs if _adds_in_place(*pair)]
        self._by_hook = {parameter: piece for parameter, piece in self._pairs if not _adds_in_place(parameter, piece)}
        self._is_paused = False
        self._hooked = (*self._by_hook, *others)
        self._handles = [parameter.register_post_accumulate_grad_hook(self._add) for parameter in self._hooked]
        self._attach()

    @property
    def is_reached(self) -> bool:
        """Whether any of the parameters has received a gradient."""
        return any(piece._version != before for (_, piece), before in zip(self._pairs, self._versions, strict=True))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Add no gradients in a block, and drop those that it leaves.

        So a module may call ``backward`` and ``zero_grad`` on the way to its loss, as adversarial training does.
        """
        self._is_paused = True
        for parameter, _ in self._in_place:
            parameter.grad = None
        try:
            yield
        finally:
            self._is_paused = False
            self._attach()

    def close(self) -> None:
        """Give the parameters their former gradients."""
        for handle in self._handles:
            handle.remove()
        for parameter, grad in self._before:
            parameter.grad = grad

    def _attach(self) -> None:
        for parameter, piece in self._in_place:
            parameter.grad = piece
        for parameter in self._hooked:
            parameter.grad = None

    def _add(self, parameter: Tensor) -> None:
        if self._is_paused:
            return
        piece = self._by_hook.get(parameter)
        if piece is not None:
            piece.add_(local(parameter.grad), alpha=self._scales.get(parameter, 1))  # type: ignore[arg-type]
        parameter.grad = None


def _adds_in_place(parameter: Tensor, piece: Tensor) -> bool:
    """Whether autograd can add the gradient of a parameter to a piece."""
    is_whole = local(parameter) is parameter
    return is_whole and parameter.dtype == piece.dtype and parameter.device == piece.device

"""A plain function as a merge method."""

from collections.abc import Callable

from torch import Tensor

from lightning_odem.arguments import shown
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.needs import BaseModel

MergeFunction = Callable[[Tensor, Tensor, float, MergeContext], Tensor]


class FunctionMerge(MergeMethod):
    """A rule without state, given as a function of merged and incoming model, t and context.

    The function may use ``context[BaseModel]``, or what its attribute ``needs`` declares, which
    :func:`~lightning_odem.methods.register_method` sets. It is not called for t = 0, which leaves the merged model
    untouched, nor for the first task. A rule that keeps state is a subclass of
    :class:`~lightning_odem.methods.MergeMethod`.

    Args:
        function: Returns the next merged model, shape [d]; it may overwrite and return its first argument.

    Example:
        >>> import torch
        >>> method = FunctionMerge(lambda merged, incoming, t, context: torch.maximum(merged, incoming))
        >>> method.merge(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), 0.5, MergeContext([], [])).theta
        tensor([1., 2.])
    """

    def __init__(self, function: MergeFunction) -> None:
        if not callable(function):
            raise ValueError(f"function must be a function (merged, incoming, t, context), got {shown(function)}.")
        self.function = function
        self.needs = getattr(function, "needs", (BaseModel(),))

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Call the function.

        Raises:
            ValueError: If it does not return a vector like ``merged``.
        """
        if t == 0.0:
            return MergeResult(merged)
        theta = self.function(merged, incoming, t, context)
        if not isinstance(theta, Tensor) or theta.shape != merged.shape:
            found = f"a tensor of shape {tuple(theta.shape)}" if isinstance(theta, Tensor) else repr(theta)
            name = getattr(self.function, "__name__", repr(self.function))
            raise ValueError(f"{name} must return the merged weights, shape {tuple(merged.shape)}, but gave {found}.")
        return MergeResult(theta)

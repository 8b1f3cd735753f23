"""The running average of a stream's models, kept by methods whose merged model is another one."""

from typing import Any

from torch import Tensor

from lightning_odem.methods.base import MergeContext
from lightning_odem.methods.layout import tensors


class RunningAverage:
    """The utility-weighted mean of the incoming models so far, a tensor by parameter name, on the CPU.

    Example:
        >>> import torch
        >>> average, context = RunningAverage(), MergeContext(["weight"], [(2,)])
        >>> average.keep(torch.tensor([1.0, 1.0]), context)
        >>> average.read(torch.tensor([5.0, 5.0]), context)
        tensor([1., 1.])
        >>> average.state_dict()
        {'average': {'weight': tensor([1., 1.])}}
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def read(self, merged: Tensor, context: MergeContext) -> Tensor:
        """A copy as a flat vector [d] on the CPU; where it is not known, as of parameters new to the merge, ``merged``.

        Raises:
            ValueError: If a tensor was kept in another shape.
        """
        vector = merged.to("cpu", copy=True)
        for name, piece in tensors(vector, context).items():
            if name in self._tensors:
                if self._tensors[name].shape != piece.shape:
                    kept = tuple(self._tensors[name].shape)
                    raise ValueError(
                        f"The running average has {name} in shape {kept}, the model in {tuple(piece.shape)}."
                    )
                piece.copy_(self._tensors[name])
        return vector

    def keep(self, average: Tensor, context: MergeContext) -> None:
        """Replace the average by a flat vector [d]; tensors that are not part of it stay."""
        pieces = tensors(average, context).items()
        self._tensors = self._tensors | {name: piece.to("cpu", copy=True) for name, piece in pieces}

    def state_dict(self) -> dict[str, Any]:
        """The average under ``"average"``; empty before there is one."""
        return {"average": self._tensors} if self._tensors else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an empty one forgets the average."""
        self._tensors = dict(state.get("average", {}))

"""The running average of a stream's models, for methods whose merged model is a different one."""

from typing import Any

from torch import Tensor

from lightning_odem.methods.base import MergeContext
from lightning_odem.methods.layout import tensors


class RunningAverage:
    """The utility-weighted mean of the incoming models so far, a tensor by parameter name, on the CPU.

    Example:
        >>> import torch
        >>> average, context = RunningAverage(), MergeContext(["weight"], [(2,)])
        >>> average.start(torch.tensor([1.0, 1.0]), context)
        >>> average.write_(torch.tensor([5.0, 5.0]), context)
        tensor([1., 1.])
        >>> average.move(torch.tensor([2.0, 3.0]), 0.5, context)
        >>> average.state_dict()
        {'average': {'weight': tensor([1.5000, 2.0000])}}
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def start(self, incoming: Tensor, context: MergeContext) -> None:
        """Begin with the first model [d]."""
        self._tensors = {name: piece.to("cpu", copy=True) for name, piece in tensors(incoming, context).items()}

    def write_(self, vector: Tensor, context: MergeContext) -> Tensor:
        """Overwrite a vector [d] with the average, and return it.

        Where the average is not known, for example for parameters that are new to the merge, the vector keeps its
        values.

        Raises:
            ValueError: If a tensor was kept in another shape.
        """
        pieces, known = tensors(vector, context), self._tensors
        for name in [name for name in pieces if name in known]:
            if known[name].shape != pieces[name].shape:
                kept, found = tuple(known[name].shape), tuple(pieces[name].shape)
                raise ValueError(f"The running average has {name} in shape {kept}, the model in {found}.")
        self._tensors = known | {
            name: piece.to("cpu", copy=True) for name, piece in pieces.items() if name not in known
        }
        for name, piece in pieces.items():
            piece.copy_(self._tensors[name])
        return vector

    def move(self, incoming: Tensor, t: float, context: MergeContext) -> None:
        """Take in a model [d] at operating time ``t``; tensors that are not part of the model stay."""
        pieces = tensors(incoming, context).items()
        self._tensors = self._tensors | {name: self._tensors[name].lerp(piece.cpu(), t) for name, piece in pieces}

    def state_dict(self) -> dict[str, Any]:
        """The average under ``"average"``; empty before there is one."""
        return {"average": self._tensors} if self._tensors else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an empty one forgets the average."""
        self._tensors = dict(state.get("average", {}))

"""Merging outside of a training as it was until version 0.5; to be removed with version 0.8."""

import warnings
from typing import Any

from torch import nn

from lightning_odem.methods import MergeMethod
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.report import MergeRecord
from lightning_odem.stream.stream import Stream


class Folding:
    """A :class:`~lightning_odem.stream.stream.Stream` with the module that it merges in.

    Args:
        module: The module.
        method: Merge method or its name.
        **options: Those of the stream.
    """

    def __init__(self, module: nn.Module, method: MergeMethod | str, **options: Any) -> None:
        warnings.warn("Folding goes with version 0.8; use lightning_odem.Stream.", DeprecationWarning, stacklevel=2)
        self.module = module
        self.stream = Stream(method, **options)
        self.stream.division.check(module)
        self.draw = self.stream.draw

    @property
    def merged(self) -> Snapshot | None:
        """The merged model."""
        return self.stream.state.merged

    @property
    def weights(self) -> list[float]:
        """Utility weights of the tasks merged."""
        return self.stream.state.report.weights

    def fold(self, incoming: Snapshot, task: str, *values: Any, **named: Any) -> MergeRecord:
        """Merge the next model, see :meth:`~lightning_odem.stream.stream.Stream.merge`."""
        return self.stream.merge(self.module, incoming, task, *values, **named)

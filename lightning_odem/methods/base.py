"""What a merge method is: one rule that turns merged and incoming weights into the next merged weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_odem.flow import Trajectory

if TYPE_CHECKING:
    from lightning_odem.calibration import CalibrationObjective
    from lightning_odem.calibration.task_data import TaskData
    from lightning_odem.parameters.shards import Shards

NEEDS = ("base", "calibration", "input_moments", "second_moments", "snapshots", "task_data")
SAMPLE_NEEDS = frozenset({"calibration", "input_moments"})
"""Those of :data:`NEEDS` for which calibration samples are drawn."""


@dataclass(frozen=True)
class MergeContext:
    """What a method may use besides the two models; only what it declares in ``needs`` is there.

    Of a model that several processes share (FSDP2) each vector is this process's part: its shards of all parameters,
    flat and one after the other. Only methods that say they can are given such a model.

    Args:
        names: Names of the merged parameters, in the order of the flat vectors.
        shapes: Their shapes, those of the whole parameters.
        base: The base model theta_base, shape [d] (need ``"base"``).
        calibration: Losses and gradients on the calibration buffer (need ``"calibration"``), see
            :class:`~lightning_odem.calibration.CalibrationObjective`.
        input_moments: Second moments of the inputs of linear layers and convolutions in the incoming model, by name of
            their weight and in the shape [groups, in, in], see
            :func:`~lightning_odem.calibration.input_moments` (need ``"input_moments"``). Parameters that are used
            otherwise have none, and a task without calibration samples has none at all.
        second_moments: Adam's running mean of squared gradients at the end of the incoming model's training, shape
            [d]; NaN for parameters that the optimizer never stepped (need ``"second_moments"``).
        snapshots: Weights [d] at evenly spaced steps of the incoming model's training, the oldest first; neither its
            start nor its end is among them (need ``"snapshots"``).
        task_data: The incoming task's own training batches (need ``"task_data"``), see
            :class:`~lightning_odem.calibration.task_data.TaskData`.
        on_step: Told (steps done, steps in all) while a merge goes on.
        shards: How processes share the parameters; None where the vectors are whole.
        groups: In how many groups the weights of grouped convolutions are, by name. Each group is a matrix of its own,
            and they follow each other along the first dimension. Nothing is known of groups without a module.
        transposed: Names of weights that are stored as [in, out] instead of [out, in].
        shares: Where a task is taken out, the shares of all tasks in the stream, which sum to 1.
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    base: Tensor | None = None
    calibration: "CalibrationObjective | None" = None
    input_moments: Mapping[str, Tensor] = field(default_factory=dict)
    second_moments: Tensor | None = None
    snapshots: Sequence[Tensor] = ()
    task_data: "TaskData | None" = None
    on_step: Callable[[int, int], None] | None = None
    shards: "Shards | None" = None
    groups: Mapping[str, int] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    shares: Sequence[float] = ()

    @property
    def local_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters' parts in the vectors: the whole shapes, or those of this process's shards."""
        if self.shards is None:
            return self.shapes
        return [tuple(self.shards.local_shapes[name]) for name in self.names]

    @property
    def sum_(self) -> Callable[[Tensor], None] | None:
        """Sums numbers over the processes in place, where the vectors are shards; every process has to call it."""
        return None if self.shards is None else self.shards.sum_


@dataclass(frozen=True)
class MergeResult:
    """The next merged model, and the path that led there where a method follows one.

    Args:
        theta: Merged weights, shape [d].
        trajectory: The path, or None.
        t: Operating time of ``theta`` where the method chose one itself; None for the one it was given.
    """

    theta: Tensor
    trajectory: Trajectory | None = None
    t: float | None = None


class MergeMethod(ABC):
    """A rule for continual model merging.

    Subclass it, name what it ``needs`` and write :meth:`merge`. A method may keep state from merge to merge; it is
    saved with the callback if :meth:`state_dict` returns it, as tensors in plain containers.

    Attributes:
        needs: Any of :data:`NEEDS`: what of the context the method uses. Nothing else is collected during training,
            and what cannot be had is refused before training.
        snapshots: With the need ``"snapshots"``, how many weights of the training run to keep at most, 2 or more. The
            length of a run is not known beforehand, so there may be half as many less one.
        sharded: Whether the rule can merge shards of the vectors, each process its own: what it does with an entry must
            depend on that entry alone, or on sums over all of them taken with ``context.sum_``. Of its state only dicts
            of tensors by parameter name may be shards; they are saved whole.

    Example:
        >>> import torch
        >>> class Overwrite(MergeMethod):
        ...     def merge(self, merged, incoming, t, context):
        ...         return MergeResult(incoming)
        >>> Overwrite().merge(torch.zeros(2), torch.ones(2), 0.5, MergeContext([], [])).theta
        tensor([1., 1.])
    """

    needs: frozenset[str] = frozenset()
    snapshots: int = 8
    sharded: bool = False

    @abstractmethod
    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Merge the incoming model of task k >= 2 into the merged model.

        Args:
            merged: theta_0, the merged model before, shape [d]. The method may overwrite it and return it.
            incoming: theta_1, the model just fine-tuned, shape [d]. Not to be modified.
            t: Operating time in [0, 1]. 0 must give ``merged``, bit by bit, and leave the method's state as it is; 1
                means that nothing but the incoming task counts, which rules that interpolate answer with ``incoming``.
            context: What the method declared it needs.
        """

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """Take in the first task's model; Psi_1 = psi_1 unless a method says otherwise."""
        return MergeResult(incoming)

    def remove(self, merged: Tensor, withdrawn: Tensor, share: float, context: MergeContext) -> MergeResult:
        """Take a task out of the merged model again: what is left is that of the other tasks, up to rounding.

        Args:
            merged: The merged model, shape [d]. The method may overwrite it and return it.
            withdrawn: The model that the task was merged with, shape [d]. Not to be modified. Another one cannot be
                told from it, and spoils what is left.
            share: What the task's utility weight is of the sum of all weights, in [0, 1).
            context: The base model, if the method declared that it needs it; nothing else.

        Raises:
            ValueError: If the method cannot, as by default.
        """
        from lightning_odem.methods.registry import METHODS, method_name  # which imports all methods

        able = [
            name for name, rule in METHODS.items() if getattr(rule, "remove", None) not in (None, MergeMethod.remove)
        ]
        raise ValueError(
            f"Merge method {method_name(self)!r} cannot take a task out again: what it makes of the others depends on "
            f"it. Methods that can are {', '.join(able)}."
        )

    def state_dict(self) -> dict[str, Any]:
        """State to keep from merge to merge: tensors on the CPU, numbers and strings in plain containers.

        A merge that fails goes back to what was returned before it, so later merges have to leave that as it is:
        replace tensors instead of changing them in place (``self.x = self.x * 0.9``, not ``self.x.mul_(0.9)``), or copy
        them here and in :meth:`load_state_dict`. A method that does neither is refused at its second merge.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state given by :meth:`state_dict`; an empty one takes the method back to before its first task.

        Its tensors are the stream's and not to be changed in place either.

        Raises:
            ValueError: If there is a state but the method keeps none, as when another method wrote it.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the stream has one: {', '.join(state)}.")

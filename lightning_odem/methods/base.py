"""What a merge method is: one rule that turns merged and incoming weights into the next merged weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

from lightning_odem.flow import Trajectory
from lightning_odem.methods.needs import Need

if TYPE_CHECKING:
    from lightning_odem.parameters.shards import Shards

T = TypeVar("T")


class Summed(Protocol):
    """Sums what a function computes over the parts of a model, see :meth:`MergeContext.summed`."""

    def __call__(self, compute: Callable[[], Tensor], wanted: bool = True) -> Tensor:
        """The sum; anything if it is not wanted."""


class Whole(NamedTuple):
    """A model of which a merge sees some parameters at a time.

    Args:
        shapes: Shapes of all merged parameters by name.
        summed: The sum of what a function computes over all parameters; the function is not called again for a sum that
            is known. None for methods that need no sums.
        keep: Computes a tensor, or gives the one that an earlier call of the same merge has computed.
    """

    shapes: Mapping[str, tuple[int, ...]]
    summed: Summed | None = None
    keep: Callable[[Callable[[], Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class MergeContext:
    """What a method may use besides the two models.

    A method reads what it declares in ``needs`` by the need's class, as ``context[BaseModel]``. The rest is always
    there.

    If several processes share the model (FSDP2), each vector is this process's part: its shards of all parameters, flat
    and one after the other. Only methods that declare that they can merge shards get such vectors; others get some
    parameters whole, as in a merge of files.

    Args:
        names: Names of the merged parameters, in the order of the flat vectors.
        shapes: Shapes of the whole parameters.
        needed: The values built for the method's needs, by the class of the need.
        on_step: Called with (steps done, steps in all) during a merge.
        shards: How processes share the parameters; None if the vectors are whole.
        groups: Number of groups in the weights of grouped convolutions, by name. Each group is a matrix of its own. The
            groups follow each other along the first dimension. Without a module, nothing is known about groups.
        transposed: Names of weights that are stored as [in, out] instead of [out, in].
        ranks: Ranks of the updates of adapters, by name. Each update is a matrix of at most this rank.
        shares: Shares of all tasks in the stream when a task is taken out; they sum to 1.
        discarded: By how much the stream's merged task vector differs from what the method made, relative to its norm,
            when a task is taken out: updates of adapters are cut to their rank.
        whole: The model that the parameters are of, if the vectors hold only some of them, see
            :attr:`MergeMethod.by_tensor`; otherwise None.

    Example:
        >>> import torch
        >>> from lightning_odem.methods import BaseModel
        >>> context = MergeContext(["w"], [(2,)], {BaseModel: torch.zeros(2)})
        >>> context[BaseModel]
        tensor([0., 0.])
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    needed: Mapping[type[Need[Any]], Any] = field(default_factory=dict)
    on_step: Callable[[int, int], None] | None = None
    shards: "Shards | None" = None
    groups: Mapping[str, int] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    ranks: Mapping[str, int] = field(default_factory=dict)
    shares: Sequence[float] = ()
    discarded: float = 0.0
    whole: Whole | None = None

    def __getitem__(self, need: type[Need[T]]) -> T:
        """Return what a need has brought.

        Raises:
            LookupError: If the method did not declare it.
        """
        if need not in self.needed:
            raise LookupError(
                f"The merge method reads context[{need.__name__}], but does not declare it: needs = "
                f"({need.__name__}(), ...). Declared are: {', '.join(kind.__name__ for kind in self.needed) or 'none'}."
            )
        return self.needed[need]

    def having(self, need: type[Need[T]], value: T) -> "MergeContext":
        """A context like this one in which a need has brought something else."""
        return replace(self, needed={**self.needed, need: value})

    def __contains__(self, need: object) -> bool:
        return need in self.needed

    @property
    def all_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all merged parameters by name, also of those that are not in the vectors."""
        return dict(zip(self.names, self.shapes, strict=True)) if self.whole is None else self.whole.shapes

    @property
    def local_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters' parts in the vectors: the whole shapes, or the shapes of this process's shards."""
        if self.shards is None:
            return self.shapes
        return [tuple(self.shards.local_shapes[name]) for name in self.names]

    @property
    def sum_(self) -> Callable[[Tensor], None] | None:
        """Sums numbers over the parts of the model in place, if the vectors are a part of it.

        Parts are the shards of processes, or parameters that are merged one after the other. All of them have to call
        it equally often.
        """
        if self.shards is not None:
            return self.shards.sum_
        if self.whole is None or (summed := self.whole.summed) is None:
            return None

        def sum_(numbers: Tensor) -> None:
            numbers.copy_(summed(lambda: numbers))

        return sum_

    def summed(self, compute: Callable[[], Tensor], wanted: bool = True) -> Tensor:
        """The sum of what ``compute`` gives over the parts of the model, like :attr:`sum_`.

        If the method is called again for the same merge, sums that are known are not computed again.

        Args:
            compute: Computes the numbers of this part.
            wanted: Whether this part needs the sum, or only adds to it for the others. Only the last sum of a merge may
                be one that some parts do not need.
        """
        if self.shards is None and self.whole is not None and self.whole.summed is not None:
            return self.whole.summed(compute, wanted)
        numbers = compute()
        if self.sum_ is not None:
            self.sum_(numbers)
        return numbers

    def kept(self, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor that takes long to compute, and does not change if the method is called again for the same merge.

        The method may overwrite it.
        """
        return compute() if self.whole is None or self.whole.keep is None else self.whole.keep(compute)


@dataclass(frozen=True)
class MergeResult:
    """The next merged model, and the path that led there if the method follows one.

    Args:
        theta: Merged weights, shape [d].
        trajectory: The path, or None.
        t: Operating time of ``theta`` if the method chose one itself; None for the one it was given.
    """

    theta: Tensor
    trajectory: Trajectory | None = None
    t: float | None = None


class MergeMethod(ABC):
    """A rule for continual model merging.

    Subclass it, name what it ``needs`` and write :meth:`merge`. A method may keep state from merge to merge. The
    callback saves the state if :meth:`state_dict` returns it, as tensors in plain containers.

    Attributes:
        needs: The parts of the context that the method uses, such as ``(BaseModel(), Snapshots(8))``.
            :mod:`lightning_odem.methods.needs` lists the existing needs; subclass :class:`~lightning_odem.methods.Need`
            for one of your own. Nothing else is collected during training. A need that cannot be met is refused before
            training.
        sharded: Whether the rule can merge shards of the vectors, each process its own. What it does with an entry must
            then depend on that entry alone, or on sums over all entries taken with ``context.sum_``. In its state, only
            dicts of tensors by parameter name may be shards; they are saved whole. A rule that is ``by_tensor`` and not
            ``sharded`` gets whole parameters instead, each process its own. It keeps its tensors in dicts, see
            :func:`~lightning_odem.methods.layout.parameter_of` for the keys.
        linear: Whether each entry of the merged model is the same linear combination of the merged, the incoming and
            the base model's, with coefficients that depend on ``t`` alone. The updates of adapters are then combined as
            factors of low rank, and the vectors have three coefficients in place of each update. A subclass with a
            ``merge`` or ``start`` of its own has to say so again.
        by_tensor: Whether what the rule does with a parameter depends on that parameter alone. Files are then merged a
            few parameters at a time, each from the first checkpoint to the last, so that models larger than the memory
            can be merged. It may depend on the settings. ``"sums"`` if it also depends on sums over all entries, taken
            with ``context.sum_`` or ``context.summed``: the method is then called several times for one merge. What
            takes long it computes within ``context.kept``.

    Example:
        >>> import torch
        >>> class Overwrite(MergeMethod):
        ...     def merge(self, merged, incoming, t, context):
        ...         return MergeResult(incoming)
        >>> Overwrite().merge(torch.zeros(2), torch.ones(2), 0.5, MergeContext([], [])).theta
        tensor([1., 1.])
    """

    needs: Sequence[Need[Any]] = ()
    sharded: bool = False
    linear: bool = False
    by_tensor: Literal[False, True, "sums"] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).keys() & {"merge", "start"}:
            cls.linear = vars(cls).get("linear", False)

    @abstractmethod
    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Merge the incoming model of task k >= 2 into the merged model.

        Args:
            merged: theta_0, the merged model before, shape [d]. The method may overwrite it and return it.
            incoming: theta_1, the model just fine-tuned, shape [d]. It must not be modified.
            t: Operating time in [0, 1]. 0 must give ``merged``, bit by bit, and leave the method's state as it is. 1
                means that only the incoming task counts; rules that interpolate then return ``incoming``.
            context: What the method declared that it needs.
        """

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """Take in the first task's model; Psi_1 = psi_1 unless a method says otherwise."""
        return MergeResult(incoming)

    def remove(self, merged: Tensor, withdrawn: Tensor, share: float, context: MergeContext) -> MergeResult:
        """Take a task out of the merged model again. The result is the merged model of the other tasks, up to rounding.

        Args:
            merged: The merged model, shape [d]. The method may overwrite it and return it.
            withdrawn: The model that the task was merged with, shape [d]. It must not be modified. A wrong model is not
                detected and spoils the result.
            share: The task's utility weight divided by the sum of all weights, in [0, 1).
            context: Holds the base model if the method declared that it needs it, and nothing else.

        Raises:
            ValueError: If the method cannot do this, which is the default.
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
        """Return the state to keep from merge to merge: tensors on the CPU, numbers and strings in plain containers.

        A merge that fails goes back to the state returned before it, so later merges must not change that state.
        Replace tensors instead of changing them in place (``self.x = self.x * 0.9``, not ``self.x.mul_(0.9)``), or copy
        them here and in :meth:`load_state_dict`. A method that does neither is refused at its second merge.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`; an empty one resets the method to before its first task.

        The tensors belong to the stream. Do not change them in place either.

        Raises:
            ValueError: If there is a state but the method keeps none, for example because another method wrote it.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the stream has one: {', '.join(state)}.")

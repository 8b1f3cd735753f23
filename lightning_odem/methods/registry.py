"""Merge methods by name."""

from collections.abc import Callable
from typing import TypeVar

from lightning_odem.methods.average import AverageMerge
from lightning_odem.methods.base import MergeMethod
from lightning_odem.methods.dop import DOPMerge
from lightning_odem.methods.function import FunctionMerge, MergeFunction
from lightning_odem.methods.interpolation import LinearInterpolation
from lightning_odem.methods.magmax import MagMaxMerge
from lightning_odem.methods.nufilt import NUFILTMerge
from lightning_odem.methods.ode import ODEMerge
from lightning_odem.methods.opcm import OPCMMerge
from lightning_odem.methods.task_arithmetic import TaskArithmeticMerge
from lightning_odem.methods.ties import TiesMerge

METHODS: dict[str, type[MergeMethod] | MergeFunction] = {
    "average": AverageMerge,
    "dop": DOPMerge,
    "interpolation": LinearInterpolation,
    "magmax": MagMaxMerge,
    "nufilt": NUFILTMerge,
    "ode": ODEMerge,
    "opcm": OPCMMerge,
    "task_arithmetic": TaskArithmeticMerge,
    "ties": TiesMerge,
}

Rule = TypeVar("Rule", type[MergeMethod], MergeFunction)


def register_method(name: str) -> Callable[[Rule], Rule]:
    """Give a name to a merge method of your own, so that ``ContinualMergeCallback(method=name)`` finds it.

    Decorates a subclass of :class:`~lightning_odem.methods.MergeMethod` that can be made without arguments, or a
    function ``(merged, incoming, t, context) -> theta``, see :class:`~lightning_odem.methods.FunctionMerge`.

    Raises:
        ValueError: If the name is taken.
        TypeError: If what is decorated is neither.

    Example:
        >>> @register_method("overshoot")
        ... def overshoot(merged, incoming, t, context):
        ...     return merged + 1.2 * t * (incoming - merged)
        >>> method_name(resolve_method("overshoot"))
        'overshoot'
        >>> del METHODS["overshoot"]
    """

    def register(rule: Rule) -> Rule:
        if name in METHODS:
            raise ValueError(
                f"There is a merge method {name!r} already, {METHODS[name].__name__}; choose another name."
            )
        if not (issubclass(rule, MergeMethod) if isinstance(rule, type) else callable(rule)):
            raise TypeError(f"A merge method is a subclass of MergeMethod or a function, got {rule!r}.")
        METHODS[name] = rule
        return rule

    return register


def resolve_method(method: str | MergeMethod) -> MergeMethod:
    """A merge method from its registered name, with its defaults; an instance is returned as it is.

    Raises:
        ValueError: For an unknown name; the message lists the known ones.

    Example:
        >>> resolve_method("ode").step_size
        0.05
    """
    if isinstance(method, MergeMethod):
        return method
    if method not in METHODS:
        raise ValueError(f"Unknown merge method {method!r}; the methods are {', '.join(sorted(METHODS))}.")
    rule = METHODS[method]
    return rule() if isinstance(rule, type) else FunctionMerge(rule)


def method_name(method: MergeMethod) -> str:
    """The registered name of a method, or the name of its class or function if it has none."""
    rule = method.function if isinstance(method, FunctionMerge) else type(method)
    return next((name for name, known in METHODS.items() if known is rule), rule.__name__)

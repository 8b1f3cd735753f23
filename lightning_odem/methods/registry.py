"""Merge methods by name."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, TypeVar

from lightning_odem.arguments import shown
from lightning_odem.methods.average import AverageMerge
from lightning_odem.methods.base import MergeMethod
from lightning_odem.methods.closed_form import ClosedFormMerge
from lightning_odem.methods.dop import DOPMerge
from lightning_odem.methods.function import FunctionMerge, MergeFunction
from lightning_odem.methods.hcmm import HCMMMerge
from lightning_odem.methods.interpolation import LinearInterpolation
from lightning_odem.methods.isotropic import IsotropicMerge
from lightning_odem.methods.magmax import MagMaxMerge
from lightning_odem.methods.needs import BaseModel, Need
from lightning_odem.methods.needs.need import resolve_needs
from lightning_odem.methods.nufilt import NUFILTMerge
from lightning_odem.methods.ode import ODEMerge
from lightning_odem.methods.ode_paper import PaperODEMerge
from lightning_odem.methods.ode_released import ReleasedODEMerge
from lightning_odem.methods.opcm import OPCMMerge
from lightning_odem.methods.replay import ReplayMerge
from lightning_odem.methods.second_moment import SecondMomentMerge
from lightning_odem.methods.task_arithmetic import TaskArithmeticMerge
from lightning_odem.methods.task_singular_vectors import TaskSingularVectorsMerge
from lightning_odem.methods.ties import TiesMerge
from lightning_odem.methods.trm_style import TRMStyleMerge

METHODS: dict[str, type[MergeMethod] | MergeFunction] = {
    "average": AverageMerge,
    "average_replay": ReplayMerge,
    "closed_form": ClosedFormMerge,
    "dop": DOPMerge,
    "hcmm": HCMMMerge,
    "interpolation": LinearInterpolation,
    "isotropic": IsotropicMerge,
    "magmax": MagMaxMerge,
    "nufilt": NUFILTMerge,
    "ode": ODEMerge,
    "ode_paper": PaperODEMerge,
    "ode_released": ReleasedODEMerge,
    "opcm": OPCMMerge,
    "second_moment": SecondMomentMerge,
    "task_arithmetic": TaskArithmeticMerge,
    "task_singular_vectors": TaskSingularVectorsMerge,
    "ties": TiesMerge,
    "trm_style": TRMStyleMerge,
}

Rule = TypeVar("Rule", type[MergeMethod], MergeFunction)


def register_method(name: str, needs: Iterable[Need[Any]] = ()) -> Callable[[Rule], Rule]:
    """Give a name to a merge method of your own, so that ``ContinualMergeCallback(method=name)`` finds it.

    The decorator takes a subclass of :class:`~lightning_odem.methods.MergeMethod` that can be made without arguments,
    or a function ``(merged, incoming, t, context) -> theta``, see :class:`~lightning_odem.methods.FunctionMerge`.

    Args:
        name: The name.
        needs: What a function uses of the context besides the base model, such as ``[Calibration()]``, see
            :class:`~lightning_odem.methods.MergeMethod`. A subclass declares its needs itself.

    Raises:
        ValueError: If the name is taken, or a need is not a need.
        TypeError: If the decorated object is neither.

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
        if not isinstance(rule, type):
            rule.needs = (BaseModel(), *needs)  # type: ignore[attr-defined]
        resolve_needs(rule)
        METHODS[name] = rule
        return rule

    return register


def resolve_method(method: str | MergeMethod) -> MergeMethod:
    """Make a merge method with its defaults from its registered name or from the import path of a class or function.

    An instance is returned as it is.

    Raises:
        ValueError: For an unknown name, listing the known ones; for an import path that does not exist; for unknown
            needs.

    Example:
        >>> resolve_method("ode_paper").step_size
        0.05
        >>> resolve_method("torch.lerp").function.__name__
        'lerp'
    """
    if isinstance(method, MergeMethod):
        resolve_needs(method)
        return method
    if not isinstance(method, str):
        raise ValueError(f"method must be the name of a merge method or a MergeMethod, got method={shown(method)}.")
    rule = METHODS[method] if method in METHODS else _import(method)
    try:
        made = rule() if isinstance(rule, type) else FunctionMerge(rule)
    except TypeError as error:  # abstract, or arguments without defaults
        raise ValueError(f"method={method!r} cannot be made without arguments: {error}. Give an instance.") from error
    resolve_needs(made)
    return made


def _import(path: str) -> type[MergeMethod] | MergeFunction:
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"Unknown merge method {shown(path)}; the methods are {', '.join(sorted(METHODS))}.")
    try:
        rule = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two for "..x" and the like
        raise ValueError(f"There is no merge method at {shown(path)}: {error}.") from error
    if not callable(rule) or (isinstance(rule, type) and not issubclass(rule, MergeMethod)):
        raise ValueError(f"{path} is not a merge method: neither a subclass of MergeMethod nor a function.")
    return rule


def method_name(method: MergeMethod) -> str:
    """The registered name of a method, or the name of its class or function if it has none."""
    rule = method.function if isinstance(method, FunctionMerge) else type(method)
    return next((name for name, known in METHODS.items() if known is rule), rule.__name__)

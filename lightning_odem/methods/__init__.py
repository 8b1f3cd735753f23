"""Merge methods by name."""

from lightning_odem.methods.average import AverageMerge
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.ode import ODEMerge

METHODS: dict[str, type[MergeMethod]] = {"average": AverageMerge, "ode": ODEMerge}

__all__ = [
    "METHODS",
    "AverageMerge",
    "MergeContext",
    "MergeMethod",
    "MergeResult",
    "ODEMerge",
    "method_name",
    "resolve_method",
]


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
    return METHODS[method]()


def method_name(method: MergeMethod) -> str:
    """The registered name of a method, or its class name if it has none."""
    return next((name for name, kind in METHODS.items() if kind is type(method)), type(method).__name__)

"""The settings of a merge method as plain data."""

import inspect
import re
from typing import Any

from lightning_odem.methods.base import MergeMethod
from lightning_odem.methods.function import FunctionMerge
from lightning_odem.methods.registry import method_name


def describe_method(method: MergeMethod) -> dict[str, Any]:
    """Name and constructor arguments of a method, fit for JSON; two methods with the same description merge alike.

    Arguments are read from the attributes of the same names, as the methods of this package keep them. A function is
    described by its source as well.

    Example:
        >>> from lightning_odem.methods import LinearInterpolation
        >>> describe_method(LinearInterpolation(0.1))
        {'name': 'interpolation', 'coefficient': 0.1}
    """
    if isinstance(method, FunctionMerge):
        return {"name": method_name(method), "source": _source(method.function)}
    names = [name for name in inspect.signature(type(method)).parameters if hasattr(method, name)]
    return {"name": method_name(method), **{name: _plain(getattr(method, name)) for name in names}}


def _plain(value: Any) -> Any:
    if isinstance(value, MergeMethod):
        return describe_method(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return repr(function)

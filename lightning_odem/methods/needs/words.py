"""Needs declared and read as words, as version 0.5 and before did. This module will be removed with version 0.8."""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from lightning_odem.methods.needs.base_model import BaseModel
from lightning_odem.methods.needs.calibration import Calibration
from lightning_odem.methods.needs.input_moments import InputMoments
from lightning_odem.methods.needs.need import Need, combine
from lightning_odem.methods.needs.second_moments import SecondMoments
from lightning_odem.methods.needs.snapshots import Snapshots
from lightning_odem.methods.needs.training_data import TrainingData

T = TypeVar("T")

WORDS: dict[str, type[Need[Any]]] = {
    "base": BaseModel,
    "calibration": Calibration,
    "input_moments": InputMoments,
    "second_moments": SecondMoments,
    "snapshots": Snapshots,
    "task_data": TrainingData,
}
_MISSING: dict[str, Any] = {"input_moments": {}, "snapshots": ()}


def resolve_needs(rule: Any) -> None:
    """Make the ``needs`` of a method or function objects: words and classes are replaced by objects.

    Raises:
        ValueError: For anything else, such as a misspelt word.
    """
    given = getattr(rule, "needs", ())
    given = (given,) if isinstance(given, Need | str | type) else tuple(given)
    if unknown := [need for need in given if not (need in WORDS if isinstance(need, str) else _is_need(need))]:
        raise ValueError(
            f"{rule!r} needs {', '.join(sorted(map(str, unknown)))}; a method can need objects such as "
            f"{', '.join(f'{need.__name__}()' for need in WORDS.values())}, or another subclass of Need."
        )
    # A set of words has no order.
    words = [word for word in WORDS if word in given]
    options = {"snapshots": (getattr(rule, "snapshots", 8),)}
    named = [WORDS[word](*options.get(word, ())) for word in words]
    others = [need() if isinstance(need, type) else need for need in given if not isinstance(need, str)]
    needs = combine([*others, *named])
    if words:
        message = f"Words in the needs of {rule!r} go with version 0.8; write: needs = {needs!r}"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    if needs != getattr(rule, "needs", ()):
        rule.needs = needs


def _is_need(value: object) -> bool:
    return issubclass(value, Need) if isinstance(value, type) else isinstance(value, Need)


def accepts_words(context: type[T]) -> type[T]:
    """Let a context class also accept the earlier fields: ``MergeContext(names, shapes, base=base)``."""
    make: Callable[..., None] = context.__init__

    @wraps(make)
    def init(self: T, *values: Any, **named: Any) -> None:
        if len(values) > 2 and isinstance(values[2], Tensor):  # the base model was the third argument
            named["base"] = values[2]
            values = values[:2]
        if words := [word for word in WORDS if word in named]:
            write = ", ".join(f"{WORDS[word].__name__}: {word}" for word in words)
            message = f"MergeContext(..., {words[0]}=...) goes with version 0.8; write: MergeContext(..., {{{write}}})"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            found = {WORDS[word]: named.pop(word) for word in words}
            named["needed"] = {need: value for need, value in found.items() if value is not None}
        make(self, *values, **named)

    context.__init__ = init  # type: ignore[assignment]
    return context


class EarlierFields:
    """Former fields of the context that are now needs: ``context.base`` is ``context[BaseModel]``."""

    needed: Mapping[type[Need[Any]], Any]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in WORDS:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            message = f"context.{name} goes with version 0.8; write: context[{WORDS[name].__name__}]"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return self.needed.get(WORDS[name], _MISSING.get(name))

"""What a need is, from the check before a training to the value that a merge gets."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning_odem.methods.needs.sources import Offer, Sources, TrainingRun

if TYPE_CHECKING:
    from lightning_odem.report.record import MergeRecord

T = TypeVar("T")


class Need(ABC, Generic[T]):
    """Something that a merge method uses besides the two models; T is the type of what it gets.

    A method declares instances, ``needs = (BaseModel(), Snapshots(8))``, and reads ``context[Snapshots]``. The
    callback, comparisons and merges of checkpoints know no need by name; they go through the needs of the method. So a
    new need is one subclass. It has to define :meth:`build` and may define the rest.

    Needs are equal if their classes and attributes are equal. One instance serves many trainings, so it stores nothing
    from them.

    Attributes:
        source: Where the need comes from; the error for a merge without it quotes this.
        from_samples: Whether calibration samples are drawn for it.

    Example:
        >>> class Origin(Need[str]):
        ...     def build(self, sources):
        ...         return sources.task
        >>> from lightning_odem.methods import MergeContext
        >>> MergeContext([], [], {Origin: "digits"})[Origin]
        'digits'
    """

    source: str = ""
    from_samples: bool = False

    def check(self, run: TrainingRun) -> None:
        """Before a training: refuse a training that cannot provide what is needed.

        Raises:
            ValueError: If the training cannot provide it.
        """

    def see(self, run: TrainingRun, kept: dict[str, Any]) -> None:
        """After every training batch: put into ``kept`` what has to be remembered until the end.

        ``kept`` is saved in checkpoints, so it holds tensors on the CPU, numbers and strings in plain containers.
        Replace its contents; do not change them in place.
        """

    def collect(self, run: TrainingRun, kept: dict[str, Any]) -> Any:
        """At the end of a training: return what it leaves for the merge, in the same form as ``kept``."""

    @property
    def collects(self) -> bool:
        """Whether something has to be collected in the training."""
        return type(self).collect is not Need.collect

    def is_met(self, offer: Offer) -> bool:
        """Whether a merge with these sources can build the need; by default, if it has what was collected, if any."""
        return not self.collects or offer.collected.get(type(self)) is not None

    @abstractmethod
    def build(self, sources: Sources) -> T:
        """When a merge starts: return what the method finds in its context.

        An error leaves the incoming model as it is.
        """

    def account(self, built: T, record: "MergeRecord") -> None:
        """After the merge: write the cost of using the need into the record."""

    def join(self, other: "Need[T]") -> "Need[T]":
        """Return a need that serves both this one and another of its class; by default this one, as all are alike."""
        return self

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, vars(self).values()))})"


def combine(needs: Iterable[Need[Any]]) -> tuple[Need[Any], ...]:
    """Remove duplicate needs: one need of each class is left, which serves all of that class.

    Example:
        >>> from lightning_odem.methods.needs import BaseModel, Snapshots
        >>> combine([Snapshots(4), BaseModel(), Snapshots(8), BaseModel()])
        (Snapshots(8), BaseModel())
    """
    found: dict[type[Need[Any]], Need[Any]] = {}
    for need in needs:
        kind = type(need)
        found[kind] = found[kind].join(need) if kind in found else need
    return tuple(found.values())


def resolve_needs(rule: Any) -> None:
    """Make the ``needs`` of a method or function a tuple of objects, one of each class.

    One need without a tuple, and classes of needs without arguments, are accepted.

    Raises:
        ValueError: For anything else.
    """
    given = getattr(rule, "needs", ())
    given = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if unknown := [need for need in given if not _is_need(need)]:
        raise ValueError(
            f"{rule!r} needs {', '.join(sorted(map(str, unknown)))}; a method can need objects such as "
            "BaseModel(), Calibration(), InputMoments(), SecondMoments(), Snapshots(), TrainingData(), or another "
            "subclass of Need."
        )
    needs = combine(need() if isinstance(need, type) else need for need in given)
    if needs != getattr(rule, "needs", ()):
        rule.needs = needs


def _is_need(value: object) -> bool:
    return issubclass(value, Need) if isinstance(value, type) else isinstance(value, Need)

"""What a need is: from the check before a training to what a merge is given."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightning_odem.methods.needs.sources import Offer, Sources
from lightning_odem.methods.needs.training_run import TrainingRun

if TYPE_CHECKING:
    from lightning_odem.report.record import MergeRecord

T = TypeVar("T")


class Need(ABC, Generic[T]):
    """Something that a merge method uses besides the two models; T is the type of what it gets.

    A method declares instances, ``needs = (BaseModel(), Snapshots(8))``, and reads ``context[Snapshots]``. Callback,
    comparisons and merges of checkpoints know no need by name: they go through those of the method. So a new need is
    one subclass, of which :meth:`build` has to be written and the rest may be.

    Needs are equal if class and attributes are. One instance serves many trainings, so it keeps nothing of them.

    Attributes:
        source: Where it comes from, as the refusal of a merge without it says.
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
        """Before a training: refuse one that cannot leave what is needed.

        Raises:
            ValueError: If it cannot.
        """

    def see(self, run: TrainingRun, kept: dict[str, Any]) -> None:
        """After every training batch: put into ``kept`` what is to be remembered until the end.

        ``kept`` travels in checkpoints, so it holds tensors on the CPU, numbers and strings in plain containers, and
        what is in it is replaced, not changed in place.
        """

    def collect(self, run: TrainingRun, kept: dict[str, Any]) -> Any:
        """At the end of a training: what it leaves for the merge, of the same kind as ``kept``."""

    @property
    def collects(self) -> bool:
        """Whether something of the training is needed."""
        return type(self).collect is not Need.collect

    def is_met(self, offer: Offer) -> bool:
        """Whether a merge that has these sources can build it; by default one that has what was collected, if any."""
        return not self.collects or offer.collected.get(type(self)) is not None

    @abstractmethod
    def build(self, sources: Sources) -> T:
        """When a merge starts: what the method finds in its context. An error leaves the incoming model as it is."""

    def account(self, built: T, record: "MergeRecord") -> None:
        """After the merge: write into the record what the use of it has cost."""

    def join(self, other: "Need[T]") -> "Need[T]":
        """What serves both this and another need of its class; this one, where all are alike."""
        return self

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, vars(self).values()))})"


def combine(needs: Iterable[Need[Any]]) -> tuple[Need[Any], ...]:
    """Needs without those that occur again; of one class there is one, which serves all.

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

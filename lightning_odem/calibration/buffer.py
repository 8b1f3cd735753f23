"""The rolling calibration buffer: a bounded number of samples of all tasks seen."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_odem.arguments import check_flag, check_integer, check_seed, shown
from lightning_odem.calibration import batches
from lightning_odem.calibration.items import Collate, Items
from lightning_odem.calibration.quota import allocate, balanced_order
from lightning_odem.calibration.samples import MicroBatch, TaskSamples

QUOTAS = ("equal", "utility")
SHARES = ("quota", "equal", "utility")


class CalibrationBuffer:
    """At most ``capacity`` samples of all tasks seen; quotas shrink as tasks arrive.

    When task k arrives, every task keeps floor(N / k) samples or one more, so that the sum is N. Places that a small
    task cannot fill go to the others. Samples of earlier tasks are only discarded, never drawn again. The samples of a
    task stay class-balanced if its labels are classes. Samples stay on the CPU in their own dtype (uint8 images stay
    uint8) and are handed out in micro-batches.

    Args:
        capacity: Samples kept in all, N. The paper has 1024; its Table 3 is flat from 512 on.
        quota: ``"equal"`` gives every task the same share of the places, as in the paper. ``"utility"`` gives places in
            proportion to the utility weights.
        seed: Seed of the choice among a task's samples. The task and the seed alone decide the choice.
        shares: Each task's share of the calibration loss. ``"quota"`` is its share of the places, ``"equal"`` the same
            for all tasks, ``"utility"`` in proportion to the utility weights.
        balanced: Whether the choice among a task's samples is class-balanced. Otherwise no label is read for it.

    Raises:
        ValueError: For a capacity below 1, an unknown quota or unknown shares.

    Example:
        >>> import torch
        >>> buffer = CalibrationBuffer(capacity=5)
        >>> buffer.add("digits", (torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 2))
        >>> buffer.add("letters", (torch.ones(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 4))
        >>> buffer.counts
        {'digits': 3, 'letters': 2}
        >>> [(batch.task, batch.share) for batch in buffer.micro_batches(2)]
        [('digits', 0.3333333333333333), ('digits', 0.16666666666666666), ('letters', 0.5)]
    """

    def __init__(
        self,
        capacity: int = 1024,
        quota: str = "equal",
        seed: int = 0,
        shares: str = "quota",
        balanced: bool = True,
    ) -> None:
        if not isinstance(quota, str) or quota not in QUOTAS:
            raise ValueError(f"Unknown quota {shown(quota)}; the quotas are {', '.join(QUOTAS)}.")
        if not isinstance(shares, str) or shares not in SHARES:
            raise ValueError(f"Unknown shares {shown(shares)}; there are {', '.join(SHARES)}.")
        self.capacity = check_integer("capacity", capacity, 1)
        self.quota = quota
        self.seed = check_seed("seed", seed)
        self.balanced = check_flag("balanced", balanced)
        self._shared_by = shares
        self._tasks: dict[str, TaskSamples] = {}

    def __len__(self) -> int:
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Samples held per task, in the order of arrival."""
        return {task: len(held) for task, held in self._tasks.items()}

    def generator(self) -> torch.Generator:
        """A new generator for the next task's choices; it depends on the seed and the number of tasks only."""
        return torch.Generator().manual_seed(self.seed + 7919 * len(self._tasks))

    def room_for_next(self, weight: float = 1.0) -> int:
        """Places that a further task of this utility weight would get if it had samples enough.

        Raises:
            ValueError: If the buffer cannot give every task a place.
        """
        if len(self._tasks) + 1 > self.capacity:
            raise ValueError(
                f"A calibration buffer of {self.capacity} samples has no place for task {len(self._tasks) + 1}; "
                f"raise the capacity to the number of tasks at least."
            )
        held = list(self._tasks.values())
        return self._allocate([*(task.weight for task in held), weight], [*map(len, held), self.capacity])[-1]

    def add(self, task: str, samples: Any, *, weight: float = 1.0, transferred: bool = False) -> None:
        """Take in a task's samples and shrink the others to their new quotas.

        Args:
            task: Name of the task, new to the buffer.
            samples: Tensors [n, ...] in dict, list or tuple, or what :mod:`~lightning_odem.calibration.keeping` makes
                of other samples. Class labels are ``samples[1]`` or an entry named ``label``, ``labels``, ``target``,
                ``targets`` or ``y``, if they are integers [n].
            weight: Utility weight of the task.
            transferred: As in :class:`TaskSamples`.

        Raises:
            ValueError: If the task is in the buffer already, has no sample, or gets no place, or its weight is negative
                or not finite. Nothing is changed then.
            TypeError: If the samples are not tensors in plain containers.
        """
        if task in self._tasks:
            raise ValueError(f"Task {task!r} is in the calibration buffer already; it holds {', '.join(self._tasks)}.")
        if not (math.isfinite(weight) and weight >= 0.0):
            raise ValueError(f"The weight of task {task!r} must be finite and non-negative, got {weight}.")
        size = batches.count(samples)
        if size == 0:
            raise ValueError(f"Task {task!r} offers no calibration sample.")
        self.room_for_next(weight)
        tasks = {**self._tasks, task: TaskSamples(samples, weight, transferred)}
        places = self._allocate([held.weight for held in tasks.values()], [len(held) for held in tasks.values()])
        order = balanced_order(batches.labels(samples) if self.balanced else None, size, self.generator())
        kept: dict[str, TaskSamples] = {}
        for (name, held), room in zip(tasks.items(), places, strict=True):
            index = order[:room] if name == task else slice(room)
            unchanged = name != task and room == len(held)
            kept[name] = held if unchanged else held.select(index)
        self._tasks = kept

    def store_logits(self, task: str, logits: Tensor) -> None:
        """Keep logits [n, C] with the n samples of a task; they are in the order of :meth:`micro_batches_of`.

        Raises:
            ValueError: If their number is not that of the samples.
        """
        held = self._tasks[task]
        if len(logits) != len(held):
            raise ValueError(f"Task {task!r} holds {len(held)} samples, got logits of {len(logits)}.")
        self._tasks[task] = replace(held, logits=logits.detach().cpu())

    def without_logits(self) -> list[str]:
        """Tasks that hold samples without logits."""
        return [task for task, held in self._tasks.items() if len(held) and held.logits is None]

    def shares(self) -> dict[str, float]:
        """Each task's share of the calibration loss; tasks without samples or share are left out. They sum to 1."""
        weights = {task: held.weight for task, held in self._tasks.items() if len(held)}
        rule = self.quota if self._shared_by == "quota" else self._shared_by
        raw = _proportions(rule, list(weights.values()))
        return {task: share / sum(raw) for task, share in zip(weights, raw, strict=True) if share}

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """One pass over the buffer, task by task, always in the same order."""
        for task, share in self.shares().items():
            yield from self.micro_batches_of(task, size, share)

    def micro_batches_of(self, task: str, size: int, share: float = 1.0) -> Iterator[MicroBatch]:
        """The samples of one task, always in the same order; the shares of its micro-batches sum to ``share``."""
        held = self._tasks[task]
        count = len(held)
        for start in range(0, count, size):
            part = (min(start + size, count) - start) / count
            yield held.view(slice(start, start + size)).as_batch(task, share * part)

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[list[MicroBatch]]:
        r"""One epoch of random minibatches, each sample once; a minibatch is one micro-batch per task.

        Tasks without a share of the loss are left out. Each minibatch is an unbiased estimate of the calibration loss.
        A sample of task j counts :math:`\frac{s_j}{n_j} \frac{N}{B}` in a minibatch of B samples. Here :math:`s_j` is
        the task's share, :math:`n_j` the number of its samples and N that of all samples. So the shares sum to 1 in the
        mean over an epoch, not in each minibatch.

        Args:
            size: Samples per minibatch; the last one of the epoch has the rest.
            generator: Source of randomness, on the CPU.

        Example:
            >>> buffer = CalibrationBuffer()
            >>> buffer.add("digits", (torch.zeros(3, 2), torch.arange(3)))
            >>> buffer.add("letters", (torch.zeros(1, 2), torch.arange(1)))
            >>> whole, = buffer.minibatches(4, torch.Generator())
            >>> [(batch.task, len(batch.samples[1]), batch.share) for batch in whole]
            [('digits', 3, 0.5), ('letters', 1, 0.5)]
        """
        shares = list(self.shares().items())
        counts = torch.tensor([len(self._tasks[task]) for task, _ in shares], dtype=torch.long)
        ends = counts.cumsum(0)
        total = int(counts.sum())
        for chunk in torch.randperm(total, generator=generator).split(size):
            owner = torch.searchsorted(ends, chunk, right=True)
            minibatch = []
            for number in owner.unique().tolist():  # those of a long stream that the chunk has samples of
                task, share = shares[number]
                held = self._tasks[task]
                index = chunk[owner == number] - (ends[number] - counts[number])
                part = len(index) / len(held) * total / len(chunk)
                minibatch.append(held.select(index).as_batch(task, share * part))
            yield minibatch

    def copy(self) -> "CalibrationBuffer":
        """A buffer that can be added to without changing this one; both share the samples, which never change."""
        other = CalibrationBuffer(self.capacity, self.quota, self.seed, self._shared_by, self.balanced)
        other._tasks = dict(self._tasks)
        return other

    def part(self, index: Mapping[str, slice]) -> "CalibrationBuffer":
        """A copy with a range of each task's samples; it shares their memory."""
        return self.changed(lambda task, held: held.view(index[task]))

    def changed(self, change: Callable[[str, TaskSamples], TaskSamples]) -> "CalibrationBuffer":
        """A copy with what a function makes of the name and the samples of each task."""
        other = self.copy()
        other._tasks = {task: change(task, held) for task, held in self._tasks.items()}
        return other

    def collate_by(self, collate: Collate | None) -> None:
        """Give items kept by an earlier process their collate function, which a file cannot hold."""
        for task, held in self._tasks.items():
            if isinstance(held.samples, Items):
                self._tasks[task] = replace(held, samples=held.samples.collated_by(collate))

    def without(self, task: str) -> "CalibrationBuffer":
        """A copy without a task's samples; their places go to the tasks that are added later."""
        other = self.copy()
        other._tasks.pop(task, None)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers, loadable with ``weights_only=True``."""
        return {
            "capacity": self.capacity,
            "quota": self.quota,
            "seed": self.seed,
            "tasks": {name: held.state() for name, held in self._tasks.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the samples, and the settings they were chosen under, by those of a :meth:`state_dict`.

        The settings ``shares`` and ``balanced`` stay, since they belong to the loss.
        """
        self.capacity, self.quota, self.seed = state["capacity"], state["quota"], state["seed"]
        self._tasks = {name: TaskSamples.from_state(held) for name, held in state["tasks"].items()}

    def _allocate(self, weights: list[float], available: list[int]) -> list[int]:
        return allocate(self.capacity, _proportions(self.quota, weights), available)


def _proportions(rule: str, weights: list[float]) -> list[float]:
    # If all tasks so far have weight 0, a loss still needs samples.
    return weights if rule == "utility" and any(weights) else [1.0] * len(weights)

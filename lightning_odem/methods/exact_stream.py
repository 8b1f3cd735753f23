"""Rules that depend on the tasks through sums alone, kept as running sums."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_odem.arguments import check_flag
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.factored import compact, is_factored, moved, whole
from lightning_odem.methods.layout import tensors
from lightning_odem.methods.linalg import norm
from lightning_odem.methods.needs import BaseModel, Need

Sums = dict[str, Tensor]


class ExactStream(MergeMethod):
    r"""A one-shot rule kept as running sums: the stream gives the same result as the rule on all models at once.

    The published sequential forms of one-shot rules feed the merged model back in as if it were a fine-tuned one. A
    rule that sees the task vectors :math:`\tau_k = \psi_k - \psi_0` only through sums needs no such recursion. It keeps

    .. math:: S_k = \sum_{j \le k} p_j\, s(\tau_j), \qquad p_j = w_j / \sum_{i \le k} w_i,

    and reads the merged model from them, :math:`\Psi_k = \psi_0 + f(S_k, n_k)`. So the order of the tasks does not
    matter, utility weights enter linearly, memory does not grow with the number of tasks, and a task can be taken out
    again (:meth:`remove`). The number of tasks, counted by their shares, is :math:`n_k = 1 / \sum_j p_j^2`: K for equal
    weights. Rules that are sums instead of means multiply by it.

    One task alone gives its own model. A task of weight 0 leaves the merged model and the sums as they are, bit by bit.
    If the method takes over a stream that another one began, the merged model it finds counts as one task.

    With ``recursion`` the rule is applied to two models at every merge, the merged one and the incoming one. This is
    the sequential baseline of the literature, for comparison. Utility weights then have no effect.

    A subclass writes :meth:`statistics` and :meth:`solve`. This class keeps the mean task vector, with the updates of
    adapters as factors while these are smaller. The sums lie in main memory, in fp32 or the higher precision of the
    vectors.
    """

    needs: Sequence[Need[Any]] = (BaseModel(),)

    def __init__(self, recursion: bool = False) -> None:
        self.recursion = check_flag("recursion", recursion)
        self._mean: Sums = {}
        self._sums: Sums = {}
        self._concentration = 1.0

    @abstractmethod
    def statistics(self, task_vector: Tensor, context: MergeContext) -> Iterator[tuple[str, Tensor]]:
        """Yield what a task adds to the sums besides its task vector [d], by key, one tensor after the other."""

    @abstractmethod
    def solve(self, mean: Tensor, sums: Sums, context: MergeContext) -> Tensor:
        """Compute the merged task vector [d] from the mean task vector, whose memory it may use, and the other sums."""

    @property
    def tasks(self) -> float:
        """Number of tasks in the sums, counted by their shares."""
        return 1.0 / self._concentration

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The first task's model as it is."""
        self.load_state_dict({})
        self._mean, self._sums = self._of(incoming, context)
        return MergeResult(incoming)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Add the task to the sums and read the merged model."""
        if t == 0.0:
            return MergeResult(merged)
        if self.recursion:
            self.load_state_dict({})
            t = 0.5
        self.add(merged, incoming, t, context)
        return MergeResult(incoming if self.tasks == 1.0 else self.read(context))

    def remove(self, merged: Tensor, withdrawn: Tensor, share: float, context: MergeContext) -> MergeResult:
        """Subtract what a task added, and read the merged model of the others.

        Raises:
            ValueError: If the sums do not hold the tasks one by one: with ``recursion``, or if another method merged
                some of them. Also if the merged model is not the one that this method reads from the sums with its
                settings.
        """
        if share == 0.0:
            return MergeResult(merged)
        self.check_tasks(context)
        self.complete(merged, context)
        # Merges on another device differ by rounding only, adapters by what was cut to keep their rank.
        cut = 1.01 * context.discarded * norm(self.read(context) - context[BaseModel])
        if self.tasks != 1.0 and norm(self.read(context).sub_(merged)) > 0.01 * norm(self.mean(context)) + cut:
            raise ValueError(
                f"{type(self).__name__} does not read the stream's merged model from its sums: the model was merged "
                "with other settings. Give the method those."
            )
        self.subtract(merged, withdrawn, share, context)
        return MergeResult(self.model_mean(context) if self.tasks == 1.0 else self.read(context))

    def add(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> None:
        """Take a model [d] into the sums at operating time ``t``; ``merged`` fills in what they do not know yet."""
        self._move(incoming, t, merged, context)
        self._concentration = (1.0 - t) ** 2 * self._concentration + t**2

    def subtract(self, merged: Tensor, withdrawn: Tensor, share: float, context: MergeContext) -> None:
        """Take a model [d] out of the sums; ``merged`` fills in what they do not know."""
        self._move(withdrawn, -share / (1.0 - share), merged, context)
        left = (self._concentration - share**2) / (1.0 - share) ** 2
        # It is 1 for a single remaining task, up to rounding.
        self._concentration = 1.0 if left > 1.0 - 1e-9 else left

    def check_tasks(self, context: MergeContext) -> None:
        """Check that the sums hold the tasks one by one, each with its share, so that one can be taken out.

        Raises:
            ValueError: If the number of tasks shows that they do not.
        """
        expected = math.fsum(share**2 for share in context.shares) or self._concentration
        if self.recursion or not self._mean or not math.isclose(self._concentration, expected, rel_tol=1e-6):
            raise ValueError(
                f"{type(self).__name__} cannot take a task out: its sums do not hold the tasks of the stream one by "
                "one. Another method has merged some of them, or one that feeds the merged model back in "
                "(recursion=True)."
            )

    def complete(self, merged: Tensor, context: MergeContext) -> None:
        """Fill in what the sums do not know yet from the merged model [d]."""
        if any(name not in self._mean for name in context.names):
            mean, sums = self._of(merged, context)
            self._mean, self._sums = mean | self._mean, sums | self._sums

    def read(self, context: MergeContext) -> Tensor:
        """The merged model [d], a new vector."""
        return self.solve(self.mean(context), self._sums, context).add_(context[BaseModel])

    def mean(self, context: MergeContext) -> Tensor:
        """The mean task vector [d], a new vector."""
        mean = torch.empty_like(context[BaseModel])
        for name, piece in tensors(mean, context).items():
            piece.copy_(whole(self._mean[name], piece.shape))
        return mean

    def model_mean(self, context: MergeContext) -> Tensor:
        """The mean of the tasks' models [d], a new vector."""
        return self.mean(context).add_(context[BaseModel])

    def state_dict(self) -> dict[str, Any]:
        """The mean task vector, the other sums and the sum of the squared shares; empty before the first task."""
        if not self._mean:
            return {}
        return {"mean": self._mean, "sums": self._sums, "concentration": self._concentration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; an empty one begins a new stream.

        Raises:
            ValueError: If another method wrote it.
        """
        if state and state.keys() != {"mean", "sums", "concentration"}:
            raise ValueError(
                f"{type(self).__name__} keeps mean, sums and concentration, but the stream's state has: "
                f"{', '.join(state)}."
            )
        self._mean, self._sums = dict(state.get("mean", {})), dict(state.get("sums", {}))
        self._concentration = state.get("concentration", 1.0)

    def _of(self, model: Tensor, context: MergeContext) -> tuple[Sums, Sums]:
        """Task vector by parameter and statistics of one model, on the CPU."""
        task_vector = model - context[BaseModel]
        mean = {
            name: compact(piece, context.ranks[name]) if name in context.ranks else piece.to("cpu", copy=True)
            for name, piece in tensors(task_vector, context).items()
        }
        return mean, {key: tensor.cpu() for key, tensor in self.statistics(task_vector, context)}

    def _move(self, model: Tensor, t: float, merged: Tensor, context: MergeContext) -> None:
        """Move the sums by ``t`` towards a model's statistics. The sums are replaced, not changed in place."""
        self.complete(merged, context)
        shapes = dict(zip(context.names, context.local_shapes, strict=True))
        for kept, found in zip((self._mean, self._sums), self._of(model, context), strict=True):
            for key, tensor in found.items():
                is_update = kept is self._mean and key in context.ranks
                shape = shapes[key] if is_update else tensor.shape
                fits = key in kept and (kept[key].shape == shape or (is_update and is_factored(kept[key], shape)))
                if not fits:
                    there = f"kept {key} in shape {tuple(kept[key].shape)}" if key in kept else f"not kept {key}"
                    raise ValueError(
                        f"{type(self).__name__} has {there}, the model gives {tuple(shape)}. The state is that "
                        "of other layers, or of a version that merged them otherwise."
                    )
                found[key] = moved(kept[key], tensor, t, shape)
            kept.update(found)

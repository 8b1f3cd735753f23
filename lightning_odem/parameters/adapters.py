"""Adapters of low rank in a module: which there are, and the module computing with their whole updates for a while."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_odem.parameters.adapter_search import find_pairs
from lightning_odem.parameters.low_rank import with_factors, with_updates
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.task_parameters import Place, find_places, put_tensor
from lightning_odem.parameters.vector import canonical_name


class Adapters:
    """The trainable pairs of LoRA factors in a module, whether peft has made them or not.

    A pair is found by the names of its parameters, ``lora_A`` and ``lora_B``, also as names of modules or containers
    above them; its scale by the attribute ``scaling`` of the module that has both. A pair of which only one factor is
    trained needs no care, since the update is linear in it.

    Args:
        module: The module.
        exclude: Patterns of parameters that are not merged.

    Attributes:
        pairs: The pairs, by the name of A.

    Raises:
        ValueError: If an adapter could not be merged rightly; the message says why and what to do.

    Example:
        >>> class Adapted(nn.Linear):
        ...     def __init__(self):
        ...         super().__init__(3, 2)
        ...         self.lora_A, self.lora_B = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.zeros(2, 1))
        ...         self.scaling = 0.5
        >>> Adapters(Adapted()).pairs
        {'lora_A': FactorPair(first='lora_A', second='lora_B', scale=0.5, inputs_first=False)}
    """

    def __init__(self, module: nn.Module, exclude: Sequence[str] = ()) -> None:
        self._module = module
        self.pairs = {pair.first: pair for pair in find_pairs(module, exclude)}
        self._held: dict[str, tuple[list[Place], Tensor, Tensor]] = {}
        self._point: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def inputs_first(self) -> frozenset[str]:
        """Names of the updates that are stored as [in, out]."""
        return frozenset(name for name, pair in self.pairs.items() if pair.inputs_first)

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the updates by name."""
        return {name: pair.rank(self._held[name][2]) for name, pair in self.pairs.items()}

    def describe(self) -> str:
        """The adapters in a line."""
        named = self._named()
        ranks = sorted({pair.rank(named[pair.first]) for pair in self.pairs.values()})
        return (
            f"{len(self.pairs)} LoRA adapters of rank {', '.join(map(str, ranks))} found: tasks are merged by the "
            "updates scale * B A, not by A and B."
        )

    def expand(self) -> None:
        """Put each whole update into its module instead of the factors, until :meth:`contract` or :meth:`restore`.

        The update takes the place of A, and the identity divided by the scale that of B: the module computes the same,
        whatever its code does with the two, and autograd gives the gradient of the update.
        """
        if not self.pairs:
            return
        named = self._named()
        found = find_places(self._module, [name for pair in self.pairs.values() for name in (pair.first, pair.second)])
        identities: dict[Any, nn.Parameter] = {}
        for pair in self.pairs.values():
            first, second = named[pair.first], named[pair.second]
            update = pair.product(first, second).to(first.dtype)
            size = second.shape[1] if pair.inputs_first else len(second)
            key = (size, second.dim(), second.dtype, second.device, pair.scale)
            if key not in identities:
                identity = torch.eye(size, dtype=second.dtype, device=second.device).div_(pair.scale)
                shape = (size, size, *(1,) * (second.dim() - 2))
                identities[key] = nn.Parameter(identity.view(shape), requires_grad=False)
            for name, factor, instead in (
                (pair.first, first, nn.Parameter(update)),
                (pair.second, second, identities[key]),
            ):
                self._held[name] = (found[name], factor, factor.detach().clone())
                put_tensor(found[name], instead)

    def cut(self, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The updates as the factors can hold them, by name; gradients are then taken at these."""
        for name, pair in self.pairs.items():
            self._point[name] = pair.factors(updates[name], pair.rank(self._held[name][2]))
        return {**updates, **{name: self.pairs[name].product(*factors) for name, factors in self._point.items()}}

    def project_(self, gradients: Mapping[str, Tensor]) -> None:
        """Leave of gradients with respect to the updates what changes of the factors can follow, in place."""
        for name, factors in self._point.items():
            self.pairs[name].project_(gradients[name], *factors)

    @torch.no_grad()
    def contract(self, updates: Mapping[str, Tensor], unchanged: Mapping[str, Tensor]) -> tuple[Snapshot, float]:
        """Put the factors back, with the best approximations of other updates by their rank.

        Args:
            updates: Updates by name.
            unchanged: The updates that the factors have; where they are the same, the factors stay as they are.

        Returns:
            Factors of less than 32 bits by name, before they were rounded; and what was cut,
            relative to the updates that changed; NaN without adapters.
        """
        values = {name: value for name, (_, _, value) in self._held.items()}
        new = {name: updates[name] for name in self.pairs if not torch.equal(updates[name], unchanged[name])}
        factors, cut = self._changed(new)
        factors = {**values, **factors}
        for name, (found, factor, _) in self._held.items():
            factor.copy_(factors[name])
            put_tensor(found, factor)
        low = {name for name, factor in factors.items() if torch.finfo(self._held[name][1].dtype).bits < 32}
        return {name: factors[name].float().cpu() for name in low}, cut if self.pairs else math.nan

    @torch.no_grad()
    def restore(self) -> None:
        """Put the factors back as they were."""
        for found, factor, value in self._held.values():
            factor.copy_(value)
            put_tensor(found, factor)

    def updates(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name with updates instead of factors, see :func:`~.low_rank.with_updates`."""
        return with_updates(tensors, self.pairs)

    def squared_gradients(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""Mean squared gradients of the updates from those of the factors, V_A and V_B.

        If the squared gradients of an update are a product of a number for its row and one for its column,
        :math:`g^2_{oi} = \rho_o \kappa_i`, and its entries independent, they are :math:`V_B V_A / c` with
        :math:`c = s^2 \sum V_A \circ A^2`. Without any such gradient (c = 0) they are NaN.
        """
        seen = dict(found)
        for pair in self.pairs.values():
            if pair.first in seen and pair.second in seen:
                first = self._held[pair.first][2].to(seen[pair.first])
                constant = pair.scale**2 * (seen[pair.first] * first.square()).sum()
                seen[pair.first] = pair.product(seen[pair.first], seen.pop(pair.second)) / (pair.scale * constant)
        return seen

    def _changed(self, updates: Mapping[str, Tensor]) -> tuple[Snapshot, float]:
        """The factors of updates by name, and what was cut relative to the updates."""
        return with_factors(updates, self.pairs, {name: self._held[name][2] for name in updates})

    def _named(self) -> dict[str, Tensor]:
        return {canonical_name(name): tensor for name, tensor in self._module.named_parameters()}

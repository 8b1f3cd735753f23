"""Adapters of low rank whose merged updates are known as combinations of the models' updates."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_odem.parameters.adapters import Adapters
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.task_parameters import find_places, put_tensor
from lightning_odem.parameters.vector import check_same_shapes

MODELS = 3
"""The incoming, the merged and the base model."""


class AdapterCombination(Adapters):
    """Adapters for a rule that makes each entry of the merged model the same linear combination of the models'.

    Instead of its whole update, a pair takes part in the vector with three entries: its coordinates with respect to
    the updates of the incoming, the merged and the base model. The incoming model has (1, 0, 0) there, and what the
    rule makes of the three are the coefficients of the combination. It is cut to the rank of the factors without being
    formed. So a merge needs memory for factors only. The module cannot compute anything until :meth:`contract`.

    Example:
        >>> class Adapted(nn.Linear):
        ...     def __init__(self):
        ...         super().__init__(3, 2)
        ...         self.lora_A, self.lora_B = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(2, 1))
        ...         self.scaling = 0.5
        >>> module = Adapted()
        >>> adapters = AdapterCombination(module)
        >>> adapters.expand()
        >>> module.lora_A.detach()
        tensor([1., 0., 0.])
        >>> adapters.updates({"lora_A": torch.ones(1, 3), "lora_B": torch.zeros(2, 1)})
        {'lora_A': tensor([0., 1., 0.])}
    """

    def expand(self) -> None:
        """Put the coordinates of each update into its module instead of the factors."""
        named = self._named()
        factors = {name: named[name] for pair in self.pairs.values() for name in (pair.first, pair.second)}
        found = find_places(self._module, list(factors))
        for name, factor in factors.items():
            self._held[name] = (found[name], factor, factor.detach().clone())
        self._models: list[Mapping[str, Tensor]] = [{name: value for name, (_, _, value) in self._held.items()}]
        seen = self.updates(self._models[0])
        for name, factor in factors.items():
            instead = seen.get(name, factor.new_empty(0)).to(factor)
            put_tensor(found[name], nn.Parameter(instead, requires_grad=name in seen))

    def cut(self, updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The coordinates as they are."""
        return dict(updates)

    def updates(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name with the coordinates of updates instead of factors; NaN where a factor is not finite."""
        number = next((number for number, known in enumerate(self._models) if known is tensors), len(self._models))
        if number == MODELS:
            raise ValueError(
                "The merge method says linear = True, but reads a model besides the incoming, the merged and the base "
                "model, so adapters cannot be combined by three coefficients. Leave linear = False."
            )
        if number == len(self._models):
            self._models.append(tensors)
        seen = dict(tensors)
        for pair in self.pairs.values():
            if pair.first in seen and pair.second in seen:
                both = {name: seen[name] for name in (pair.first, pair.second)}
                own = {name: self._models[0][name].shape for name in both}
                check_same_shapes(own, {name: each.shape for name, each in both.items()}, "incoming", "merged")
                finite = all(bool(each.isfinite().all()) for each in both.values())
                del seen[pair.second]
                seen[pair.first] = torch.eye(MODELS)[number] * (1.0 if finite else math.nan)
        return seen

    def _changed(self, updates: Mapping[str, Tensor]) -> tuple[Snapshot, float]:
        factors: Snapshot = {}
        cut = whole = 0.0
        for name, coordinates in updates.items():
            pair, values = self.pairs[name], self._models[0]
            like = values[pair.first].to(torch.promote_types(values[pair.first].dtype, torch.float32))
            terms = [
                (share, model[pair.first].to(like), model[pair.second].to(like))
                for share, model in zip(coordinates.tolist(), self._models, strict=False)
            ]
            rank = pair.rank(like)
            factors[pair.first], factors[pair.second], singular = pair.combination(terms, rank)
            cut += float(singular[rank:].square().sum())
            whole += float(singular.square().sum())
        return factors, (cut / whole) ** 0.5 if whole else 0.0

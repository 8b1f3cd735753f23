"""The search for adapters of low rank in a module, and the refusal of those that could not be merged rightly."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_odem.parameters.low_rank import FactorPair
from lightning_odem.parameters.vector import canonical_name, is_excluded

_FACTOR = re.compile(r"(.*lora_?(?:embedding_)?)(A|a|down|B|b|up)(?![a-z])(.*)")
_PARTNER = {"A": "B", "a": "b", "down": "up"}
# Parts of adapters whose update is no product of two matrices, by how their names begin.
_OTHER_KINDS = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_R": "OFT",
    "boft_R": "BOFT",
    "hra_u": "HRA",
    "lora_E": "AdaLoRA",
    "vera_lambda": "VeRA",
    "vblora_logits": "VB-LoRA",
    "road_theta": "RoAd",
    "randlora_lambda": "RandLoRA",
}
_BEGINNINGS = tuple(_OTHER_KINDS)


def find_pairs(module: nn.Module, exclude: Sequence[str]) -> Iterator[FactorPair]:
    """Find the pairs of factors of which both are trained and merged.

    Args:
        module: The module.
        exclude: Patterns of parameters that are not merged.

    Raises:
        ValueError: If an adapter could not be merged rightly.
    """
    every = dict(module.named_parameters(remove_duplicate=False))
    pairs: dict[tuple[int, int], str] = {}
    used: dict[int, str] = {}
    adapters: dict[str, str] = {}
    for name, first in every.items():
        if not first.requires_grad or is_excluded(name, exclude):
            continue
        _check_kind(name)
        second = every.get(other := _partner(name))
        if second is None or not second.requires_grad or (id(first), id(second)) in pairs:
            continue
        above, part, rest = _split(name)
        if is_excluded(other, exclude):
            raise ValueError(
                f"{other} is excluded from the merge and {name} is not, but the model computes with their product. "
                "Exclude both or none."
            )
        for tensor, own in ((first, name), (second, other)):
            if id(tensor) in used:
                raise ValueError(f"{own} is a factor of two updates ({used[id(tensor)]} as well). {_remedy(part)}")
            used[id(tensor)] = own
        owner, adapter = module.get_submodule(above), rest.split(".")[0]
        _check_layer(owner, adapter, name, part)
        if adapters.setdefault(above, rest) != rest:
            raise ValueError(
                f"{above} trains several adapters at once ({adapters[above].split('.')[0]}, {adapter}). Leave one of "
                "them trainable (in peft: set_adapter(name)), or exclude the others."
            )
        pairs[id(first), id(second)] = name
        yield _pair(name, first, other, second, _scale(owner, adapter, name, part))


def adapted_layer(name: str) -> str | None:
    """The name of the module that has a factor and its partner; None of a parameter that is named like no factor."""
    above, part, _ = _split(name)
    return above if part else None


def _split(name: str) -> tuple[str, str, str]:
    """The module above a factor, the part of the name that tells which factor it is, and what follows."""
    path = name.split(".")
    for index, part in enumerate(path):
        if _FACTOR.fullmatch(part):
            return ".".join(path[:index]), part, ".".join(path[index + 1 :])
    return name, "", ""


def _partner(name: str) -> str:
    """The name of B that belongs to the name of A; empty for every other name."""
    above, part, rest = _split(name)
    factor = _FACTOR.fullmatch(part)
    if factor is None or factor[2] not in _PARTNER:
        return ""
    return ".".join(filter(None, (above, f"{factor[1]}{_PARTNER[factor[2]]}{factor[3]}", rest)))


def _pair(name: str, first: Tensor, other: str, second: Tensor, scale: float) -> FactorPair:
    if isinstance(first, DTensor) or isinstance(second, DTensor):
        raise ValueError(
            f"{name} is shared by processes (FSDP2); factors of adapters are merged where each process holds them "
            "whole. Use strategy='ddp', or leave the adapters' modules out of fully_shard."
        )
    flat = first.dim() == second.dim() == 2
    inputs_first = flat and first.shape[1] == second.shape[0] < first.shape[0]
    fits = min(first.dim(), second.dim()) >= 2 and first.shape[0] == second.shape[1] and second[0, 0].numel() == 1
    if not inputs_first and not fits:
        raise ValueError(
            f"{name} {tuple(first.shape)} and {other} {tuple(second.shape)} are no factors A [r, in] and B [out, r] of "
            f"an update B A. {_remedy(_split(name)[1])}"
        )
    return FactorPair(canonical_name(name), canonical_name(other), scale, inputs_first)


def _scale(owner: nn.Module, adapter: str, name: str, part: str) -> float:
    """The factor on B A: the attribute ``scaling`` or ``scale`` of their module, or alpha / r."""
    found: Any = getattr(owner, "scaling", getattr(owner, "scale", None))
    if isinstance(found, Mapping):
        found = found.get(adapter)
    if found is None:
        alpha = getattr(owner, "lora_alpha", getattr(owner, "alpha", None))
        rank = getattr(owner, "r", getattr(owner, "rank", None))
        if isinstance(alpha, (int, float)) and isinstance(rank, (int, float)) and rank:
            found = alpha / rank
    learned = isinstance(found, Tensor) and (found.requires_grad or found.numel() != 1)
    scale = float(found) if isinstance(found, (int, float, Tensor)) and not learned else math.nan
    if not math.isfinite(scale) or scale == 0.0:
        raise ValueError(
            f"{name} is a factor of an adapter whose scale is not known: {type(owner).__name__} has no attribute "
            "scaling that is a fixed number other than 0. Give it one, the factor on B A (1.0 if there is none). "
            f"Files of adapters do not say it: merge their folders, with adapter_config.json. {_remedy(part)}"
        )
    return scale


def _check_kind(name: str) -> None:
    for part in name.split("."):
        if not part.startswith(_BEGINNINGS):  # of almost all parameters
            continue
        for begin, kind in _OTHER_KINDS.items():
            if part.startswith(begin):
                raise ValueError(
                    f"{name} is a part of a {kind} adapter, whose update is no product of two trained matrices: a "
                    f"merge of its parts is not one of the updates. Train LoRA. {_remedy(part)}"
                )


def _check_layer(owner: nn.Module, adapter: str, name: str, part: str) -> None:
    """Refuse what peft's layers may do with factors besides adding their product."""
    if adapter in getattr(owner, "merged_adapters", ()):
        raise ValueError(
            f"The adapter {adapter!r} of {name} is folded into the base weights. Call unmerge_adapter() of the peft "
            "model before the first fit."
        )
    variants = getattr(owner, "lora_variant", {})
    variant = type(variants[adapter]).__name__ if isinstance(variants, Mapping) and variants.get(adapter) else ""
    if "Dora" not in variant and (variant or getattr(owner, "num_experts", 1) not in (None, 1)):
        what = variant or "a weight of several experts"
        raise ValueError(
            f"{name} belongs to {what}, whose update is not scale * B A. Train plain LoRA or DoRA. {_remedy(part)}"
        )


def _remedy(part: str) -> str:
    return (
        f"Otherwise leave adapters out of the merge with exclude=['*{part}*'], one kept per task, or fold them into "
        "the base weights and train those."
    )

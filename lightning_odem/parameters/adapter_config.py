"""What the configuration of a LoRA adapter says of its updates."""

import math
import re
from collections.abc import Mapping
from typing import Any

from lightning_odem.parameters.model_folder import ADAPTER_CONFIG

_ROOT = "base_model.model."
# What scale and factors of a file are made of; the updates say all of it.
_IN_THE_UPDATES = (
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
)
# Settings of the training, and notes.
_OF_THE_TRAINING = (
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "task_type",
)
_NO_PRODUCT = {
    "use_dora": "DoRA, whose weights are no sum of base and update",
    "use_qalora": "QA-LoRA, which pools the inputs",
    "use_bdlora": "block-diagonal factors",
    "target_parameters": "LoRA on parameters of several experts",
    "alora_invocation_tokens": "aLoRA, which works on some tokens only",
    "arrow_config": "a router between adapters",
    "kasa_config": "KaSA, whose update is no product of two matrices",
    "monteclora_config": "MonteCLoRA, whose factors are drawn at random",
    "velora_config": "VeLoRA",
}
FOLD = "Fold each adapter into its base (in peft: merge_and_unload(), then save_pretrained) and merge the whole models."


def module_of(name: str) -> str:
    """The module that a factor belongs to, as the configuration names it."""
    return name.removeprefix(_ROOT).rpartition(".lora_")[0]


def rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and scale of a module's update, by peft's rules."""

    def setting(pattern: str, default: str) -> float:
        entries = config.get(pattern) or {}
        keys = (key for key in entries if re.match(rf"(.*\.)?({key})$", module_of(name)))
        found = entries[key] if (key := next(keys, None)) is not None else config.get(default)
        if not isinstance(found, (int, float)) or found <= 0:
            raise ValueError(f"{ADAPTER_CONFIG} gives {name} the {default} {found!r}; a positive number is needed.")
        return found

    rank, alpha = int(setting("rank_pattern", "r")), setting("alpha_pattern", "lora_alpha")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_kind(path: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter whose update is no product of two matrices."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(
            f"{path} is an adapter of type {kind}; only the updates of LORA are known to be products of two matrices. "
            f"{FOLD}"
        )
    for setting, what in _NO_PRODUCT.items():
        if config.get(setting):
            raise ValueError(f"{path} has {setting} in its {ADAPTER_CONFIG}: {what}. {FOLD}")


def check_same(first: str, own: Mapping[str, Any], path: str, config: Mapping[str, Any]) -> None:
    """Refuse two adapters in which the same numbers mean different weights."""
    base = "base_model_name_or_path"
    if own.get(base) != config.get(base):
        raise ValueError(
            f"{first} is an adapter of {own.get(base)!r}, {path} of {config.get(base)!r}. Updates of different base "
            f"models cannot be merged. If it is the same model under two names, write one of them as {base} into both "
            f"{ADAPTER_CONFIG}."
        )
    ignored = {*_IN_THE_UPDATES, *_OF_THE_TRAINING, base}
    differing = [
        f"{key} ({own.get(key)!r}, {config.get(key)!r})"
        for key in dict.fromkeys([*own, *config])
        if key not in ignored and _comparable(key, own.get(key)) != _comparable(key, config.get(key))
    ]
    if differing:
        raise ValueError(
            f"The {ADAPTER_CONFIG} of {first} and {path} differ in {', '.join(differing)}, so that the same numbers "
            f"mean different weights. {FOLD}"
        )


def _comparable(key: str, value: Any) -> Any:
    if key == "init_lora_weights":
        # Some initialisations change the base weights under the adapter.
        return value if isinstance(value, str) and value.lower() not in ("gaussian", "eva", "orthogonal") else None
    if isinstance(value, list):
        return sorted(map(str, value))
    return value or None

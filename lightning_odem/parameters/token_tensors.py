"""The tensors of a model that have a row for each token of its vocabulary: embeddings, output weights, their biases."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.model_folder import ModelFolder
from lightning_odem.parameters.vector import canonical_name, is_excluded

_CONFIGS = ("config.json", "open_clip_config.json")
_EMBEDDINGS = {
    "embed_in",
    "embed_tokens",
    "tok_embeddings",
    "token_embedding",
    "word_embedding",
    "word_embeddings",
    "wte",
}
# Modules with a row, or a bias, for each token.
_MODULES = {
    *_EMBEDDINGS,
    *("embed", "embedding", "embeddings", "shared"),
    *("decoder", "embed_out", "final_logits_bias", "generator_lm_head", "head", "lm_head", "output", "predictions"),
    *("proj_out", "vocab_projector"),
}
WAY_OUT = (
    "Retrain one with the tokenizer of the other, or exclude the tensors with a row for each token: the merged model "
    "then has those of the first."
)


def row_count(path: str | os.PathLike, exclude: Sequence[str] = ()) -> int | None:
    """How many rows a model has for tokens: the ``vocab_size`` of its configuration, or the rows of its embedding.

    Args:
        path: The model.
        exclude: Patterns of tensors that are not merged.

    Returns:
        The number; None if no tensor that is merged has as many rows.

    Raises:
        ValueError: If there are several vocabularies.
    """
    state = _merged(read_checkpoint(path), exclude)
    sizes: set[int] = set()
    if Path(path).is_dir():
        folder = ModelFolder(path)
        files = [Path(place, name) for place in dict.fromkeys(["", *folder.weights]) for name in _CONFIGS]
        sizes = {size for file in files for size in _vocabulary_sizes(folder.config(str(file)))}
    found = {size for size in sizes if any(size in tensor.shape for tensor in state.values())}
    found = found or {tensor.shape[0] for name, tensor in state.items() if _module(name) in _EMBEDDINGS}
    if len(found) > 1:
        raise ValueError(f"{path} has several vocabularies, of {', '.join(map(str, sorted(found)))} tokens.")
    return next(iter(found), None)


def token_tensors(state: Mapping[str, Tensor], count: int, exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors with a row for each of a number of tokens, without those that are excluded.

    Raises:
        ValueError: If it is not known of a tensor whether it has.

    Example:
        >>> import torch
        >>> list(token_tensors({"wte.weight": torch.ones(9, 2), "wpe.weight": torch.ones(4, 2)}, 9))
        ['wte.weight']
    """
    found = {name: tensor for name, tensor in _merged(state, exclude).items() if count in tensor.shape}
    unknown = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in found.items()
        if _module(name) not in _MODULES or token_axis(tensor, count) < 0
    ]
    if unknown:
        raise ValueError(
            f"The vocabularies differ, and it is not known whether {', '.join(unknown)} has a row for each of the "
            f"{count} tokens. {WAY_OUT}"
        )
    return found


def token_axis(tensor: Tensor, count: int) -> int:
    """The dimension of a tensor that counts tokens; -1 if there is none."""
    if tensor.shape[0] == count:
        return 0
    return 1 if tensor.shape == (1, count) else -1


def _merged(state: Mapping[str, Tensor], exclude: Sequence[str]) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in state.items()
        if tensor.is_floating_point() and not is_excluded(canonical_name(name), exclude)
    }


def _vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """Sizes of vocabularies that a configuration names, also for parts of the model."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    own = config.get("vocab_size")
    return {*([own] if isinstance(own, int) else []), *(size for part in inner for size in _vocabulary_sizes(part))}


def _module(name: str) -> str:
    """The last part of a name that is no parameter's."""
    parts = name.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]

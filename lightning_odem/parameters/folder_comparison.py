"""What the folders of several models say about them, beside their weights."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_odem.parameters.model_folder import ModelFolder

# Settings that say nothing about what the weights mean.
_NOTES = {
    "_name_or_path",
    "__version__",
    "_commit_hash",
    "dtype",
    "model_card_data",
    "name_or_path",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}


def compare_folders(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Compare settings of model folders with those of the first.

    Args:
        paths: Models; those that are no folders say nothing.

    Returns:
        The settings in which the models differ, a line for each model.
    """
    folders = [ModelFolder(path) for path in paths if Path(path).is_dir()]
    return [line for folder in folders[1:] for line in _settings(folders[0], folder)]


def explain_difference(first: str | os.PathLike, path: str | os.PathLike) -> str:
    """What to do about tensors that only one of two folders has, or whose shapes differ; empty if nothing is known."""
    if not (Path(first).is_dir() and Path(path).is_dir()):
        return ""
    own, other = ModelFolder(first).config(), ModelFolder(path).config()
    if own.get("tie_word_embeddings") is True and other.get("tie_word_embeddings") is False:
        return (
            f"\n{first} ties its output weights to its embedding (tie_word_embeddings), {path} has weights "
            f"of their own. Give {path} first: the merged model then has weights of their own too."
        )
    sizes = [config.get("vocab_size") for config in (own, other)]
    if None not in sizes and sizes[0] != sizes[1]:
        return (
            f"\nThe vocabularies have {sizes[0]} and {sizes[1]} tokens. Give all models the same one: in transformers, "
            "model.resize_token_embeddings(n) and save_pretrained, with the same token in the same row. Or exclude the "
            "tensors with a row for each token: the merged folder then has those of the first."
        )
    return ""


def is_tied(path: str | os.PathLike) -> bool:
    """Whether a folder's configuration says that output weights are those of the embedding."""
    return Path(path).is_dir() and ModelFolder(path).config().get("tie_word_embeddings") is True


def _settings(first: ModelFolder, folder: ModelFolder) -> list[str]:
    lines = []
    files = [
        file for file in first.others() if file.name in ("config.json", "modules.json", "sentence_bert_config.json")
    ]
    for file in files:
        own, other = (_flat(each.path / file) for each in (first, folder))
        if not other:
            continue
        differing = [
            f"{key} ({own.get(key)!r:.40}, {other.get(key)!r:.40})"
            for key in dict.fromkeys([*own, *other])
            if key.split(".")[-1] not in _NOTES and own.get(key) != other.get(key)
        ]
        if differing:
            lines.append(
                f"{file} of {folder.path} differs from that of {first.path}, which goes for the merged model: "
                f"{', '.join(differing)}."
            )
    return lines


def _flat(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if isinstance(content, list):  # their classes have moved between packages
        kinds = [str(entry.get("type")).rpartition(".")[2] for entry in content if isinstance(entry, dict)]
        return {"modules": kinds}
    return content if isinstance(content, dict) else {}

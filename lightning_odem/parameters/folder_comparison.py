"""What the folders of several models say about them, beside their weights."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_odem.parameters.model_folder import ModelFolder
from lightning_odem.parameters.vector import canonical_name, is_excluded

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


def compare_folders(paths: Sequence[str | os.PathLike], exclude: Sequence[str] = ()) -> list[str]:
    """Compare vocabularies and settings of model folders with those of the first.

    Args:
        paths: Models; those that are no folders say nothing.
        exclude: Patterns of tensors that are not merged. If an embedding is one of them, the tokenizers may differ.

    Returns:
        The settings in which the models differ, a line for each model.

    Raises:
        ValueError: If two tokenizers use the same row of an embedding for different tokens.
    """
    folders = [ModelFolder(path) for path in paths if Path(path).is_dir()]
    notes: list[str] = []
    for folder in folders[1:]:
        if not _excludes_embedding(folders[0], exclude):
            _check_vocabulary(folders[0], folder)
        notes += _settings(folders[0], folder)
    return notes


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


def _excludes_embedding(first: ModelFolder, exclude: Sequence[str]) -> bool:
    rows = first.config().get("vocab_size")
    return bool(exclude) and any(
        tensor.shape[:1] == (rows,) and is_excluded(canonical_name(name), exclude)
        for name, tensor in first.read().items()
    )


def _check_vocabulary(first: ModelFolder, folder: ModelFolder) -> None:
    own, other = _tokens(first), _tokens(folder)
    differing = [row for row in own.keys() & other.keys() if own[row] != other[row]]
    if differing:
        row = min(differing)
        raise ValueError(
            f"The tokenizers of {first.path} and {folder.path} differ in {len(differing)} rows of the embedding: row "
            f"{row} is {own[row]!r} in the one, {other[row]!r} in the other. Bring the rows of {folder.path} into the "
            "order of the first and save it with the tokenizer of the first. If its model does not use the tokenizer, "
            "remove that from its folder."
        )


def _tokens(folder: ModelFolder) -> dict[int, str]:
    """Tokens by their row in the embedding; empty if the folder's tokenizer is of a form that is not known."""
    tokens: dict[Any, Any] = {}
    if (folder.path / "vocab.txt").is_file():
        tokens = dict(enumerate((folder.path / "vocab.txt").read_text(encoding="utf-8").splitlines()))
    elif (folder.path / "vocab.json").is_file():
        tokens = {row: token for token, row in folder.config("vocab.json").items()}
    if (folder.path / "tokenizer.json").is_file():
        content = folder.config("tokenizer.json")
        try:
            vocabulary = content["model"]["vocab"]
            pairs = vocabulary.items() if isinstance(vocabulary, dict) else enumerate(pair[0] for pair in vocabulary)
            tokens = {row: token for token, row in pairs} if isinstance(vocabulary, dict) else dict(pairs)
            tokens |= {entry["id"]: entry["content"] for entry in content.get("added_tokens") or ()}
        except (AttributeError, IndexError, KeyError, TypeError):
            return {}
    return tokens


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

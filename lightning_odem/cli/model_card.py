"""The README of a merged model folder."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml  # type: ignore[import-untyped]

CARD = "README.md"
# What stays true of a merged model; results and data sets of the first model do not.
_KEPT = ("base_model", "language", "library_name", "license", "license_link", "license_name", "pipeline_tag", "tags")


def model_card(first: Path, metadata: Mapping[str, str]) -> str:
    """A model card that names sources, method and weights.

    Args:
        first: README of the first model; the entries of its front matter that are true of a merged model stay.
        metadata: How the model was made, as the weights' metadata say it.

    Example:
        >>> made = {"method": "average", "settings": "{}", "tasks": '["a"]', "weights": "[1.0]", "base": ""}
        >>> hashes = {"sha256": '{"a": {"model.safetensors": "9a12"}}', "base_sha256": "{}"}
        >>> print(model_card(Path("none"), {**made, **hashes, "version": "1.0"}))
        # Merged model
        <BLANKLINE>
        Made by `lightning-odem merge` (version 1.0) with the method `average`.
        <BLANKLINE>
        | source | weight | SHA-256 of its weights |
        |---|---|---|
        | a | 1 | model.safetensors `9a12` |
        <BLANKLINE>
        Configuration, tokenizer and all else that is not a weight are those of the first source.
        <BLANKLINE>
    """
    kept = {key: value for key, value in _front_matter(first).items() if key in _KEPT}
    head = ["---", yaml.safe_dump(kept, sort_keys=False).strip(), "---", ""] if kept else []
    settings = json.loads(metadata["settings"])
    lines = [f"Made by `lightning-odem merge` (version {metadata['version']}) with the method `{metadata['method']}`."]
    if settings:
        lines += ["", "Settings: " + ", ".join(f"`{key}={value}`" for key, value in settings.items())]
    if metadata["base"]:
        lines += ["", f"Base model: {metadata['base']} (SHA-256: {_hashes(json.loads(metadata['base_sha256']))})"]
    rows = zip(json.loads(metadata["tasks"]), json.loads(metadata["weights"]), strict=True)
    digests = json.loads(metadata["sha256"])
    lines += ["", "| source | weight | SHA-256 of its weights |", "|---|---|---|"]
    lines += [f"| {_cell(task)} | {weight:g} | {_cell(_hashes(digests[task]))} |" for task, weight in rows]
    lines += [""]
    lines += ["Configuration, tokenizer and all else that is not a weight are those of the first source.", ""]
    return "\n".join([*head, "# Merged model", "", *lines])


def _front_matter(file: Path) -> dict[str, object]:
    """The YAML at the beginning of a model card; empty if there is none that can be read."""
    parts = file.read_text(encoding="utf-8", errors="replace").split("---\n") if file.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _hashes(digests: Mapping[str, str]) -> str:
    return ", ".join(f"{file} `{digest}`" for file, digest in digests.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

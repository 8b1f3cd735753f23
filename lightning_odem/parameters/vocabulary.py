"""The vocabulary of a model folder: which token has which row of the embedding."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_odem.parameters.model_folder import ModelFolder

# Vocabularies that only the library of their tokenizer can read.
_OPAQUE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "bpe.codes", "tekken.json")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by their row, and what tells whether another tokenizer means the same by the same tokens.

    Args:
        tokens: Token of each row.
        kind: How words are divided: ``WordPiece``, ``BPE``, ``Unigram``, ``WordLevel``.
        settings: Settings by which the text of a token is read, such as the prefix within a word; those that the files
            do not say are absent.
        merges: The merges of BPE in their order.
        scores: The score of each token of Unigram.
        opaque: Content of a tokenizer that cannot be read; it has no tokens then.
    """

    tokens: dict[int, str]
    kind: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    merges: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    opaque: bytes = b""

    def difference(self, other: "Vocabulary") -> str:
        """Why the same token may stand for other text in another tokenizer; empty if it does not."""
        if self.opaque or other.opaque:
            return "the tokenizers have other files of a form that cannot be read" if self._is_opaque(other) else ""
        if self.kind != other.kind:
            return f"one divides words by {self.kind}, the other by {other.kind}"
        for key in self.settings.keys() & other.settings.keys():
            if self.settings[key] != other.settings[key]:
                return f"they differ in {key} ({self.settings[key]!r}, {other.settings[key]!r})"
        if self.merges != other.merges:
            pairs = enumerate(zip(self.merges, other.merges, strict=False))
            shared = min(len(self.merges), len(other.merges))
            place = next((place for place, (own, its) in pairs if own != its), shared)
            own, its = (each.merges[place : place + 1] or ("none",) for each in (self, other))
            return (
                f"their merges differ ({len(self.merges)} and {len(other.merges)}, first at number {place + 1}: "
                f"{own[0]!r}, {its[0]!r}), so that they divide the same text into other tokens"
            )
        shared_scores = self.scores.keys() & other.scores.keys()
        if moved := sorted(token for token in shared_scores if abs(self.scores[token] - other.scores[token]) > 1e-3):
            return (
                f"the scores of {len(moved)} tokens differ ({', '.join(map(repr, moved[:3]))}), so that they divide "
                "the same text into other tokens"
            )
        return ""

    def _is_opaque(self, other: "Vocabulary") -> bool:
        return bool(self.opaque and other.opaque and self.opaque != other.opaque)


def read_vocabulary(folder: ModelFolder) -> Vocabulary | None:
    r"""The vocabulary of a folder's tokenizer; None if there is no tokenizer.

    It is read from ``tokenizer.json``, ``vocab.txt`` or ``vocab.json``, in the folder or in that of a module.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save_file({"wte.weight": torch.ones(2, 4)}, f"{path}/model.safetensors")
        ...     _ = Path(path, "vocab.txt").write_text("[PAD]\nhello\n")
        ...     read_vocabulary(ModelFolder(path)).tokens
        {0: '[PAD]', 1: 'hello'}
    """
    for place in dict.fromkeys(["", *folder.weights]):
        here = folder.path / place
        added = {row: token for token, row in _config(folder, place, "added_tokens.json").items()}
        if (here / "tokenizer.json").is_file():
            return _fast(_config(folder, place, "tokenizer.json"), (here / "tokenizer.json").read_bytes())
        if opaque := next((here / name for name in _OPAQUE if (here / name).is_file()), None):
            return Vocabulary({}, opaque=opaque.read_bytes())
        if (here / "vocab.txt").is_file():
            # Not splitlines: a token may be a separator of Unicode.
            lines = (here / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
            return Vocabulary({**dict(enumerate(lines)), **added}, "WordPiece")
        if (here / "vocab.json").is_file():
            tokens = {row: token for token, row in _config(folder, place, "vocab.json").items()}
            merges: list[str] = []
            if (here / "merges.txt").is_file():
                lines = (here / "merges.txt").read_text(encoding="utf-8").split("\n")
                merges = [line for line in lines if line and not line.startswith("#version")]
            return Vocabulary({**tokens, **added}, "BPE" if merges else "WordLevel", merges=tuple(merges))
    return None


def _config(folder: ModelFolder, place: str, name: str) -> dict[str, Any]:
    return folder.config(str(Path(place, name)))


def _fast(content: dict[str, Any], raw: bytes) -> Vocabulary:
    """The vocabulary in a file of the library tokenizers."""
    try:
        model = content["model"]
        pairs, scores = model["vocab"], {}
        if isinstance(pairs, dict):
            tokens = {row: token for token, row in pairs.items()}
        else:
            tokens = {row: pair[0] for row, pair in enumerate(pairs)}
            scores = {pair[0]: float(pair[1]) for pair in pairs}
        tokens |= {entry["id"]: entry["content"] for entry in content.get("added_tokens") or ()}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
        names = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        settings: dict[str, Any] = {name: model.get(name) or None for name in names}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return Vocabulary({}, opaque=raw)
    kind = model.get("type") or ("Unigram" if scores else "BPE" if merges else "WordPiece")
    parts = json.dumps([content.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
    # Spaces and letters beyond ASCII have other names in it.
    settings["byte level"] = "ByteLevel" in parts
    return Vocabulary(tokens, str(kind), settings, tuple(merges), scores)

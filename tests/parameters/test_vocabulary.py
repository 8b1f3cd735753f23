import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_odem.parameters.model_folder import ModelFolder
from lightning_odem.parameters.vocabulary import Vocabulary, read_vocabulary


@pytest.fixture
def read(tmp_path):
    def read(place="", **files):
        (tmp_path / place).mkdir(exist_ok=True)
        save_file({"w": torch.ones(1)}, tmp_path / place / "model.safetensors")
        if place:
            (tmp_path / "modules.json").write_text(json.dumps([{"path": place}]))
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / place / name).write_text(text)
        return read_vocabulary(ModelFolder(tmp_path))

    return read


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
UNIGRAM = {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"id": 2, "content": "c"}]}
FORMS = {
    "words": ({"vocab.txt": "a\nb\u2028c\n", "added_tokens.json": {"d": 2}}, {0: "a", 1: "b\u2028c", 2: "d"}),
    "pairs": ({"vocab.json": {"a": 0, "b": 1}, "merges.txt": "#version: 0.2\na b\n"}, {0: "a", 1: "b"}),
    "pieces": ({"tokenizer.json": UNIGRAM}, {0: "a", 1: "b", 2: "c"}),
    "merges": ({"tokenizer.json": {"model": BPE}, "vocab.txt": "other"}, {0: "a", 1: "b", 2: "ab"}),
}


@pytest.mark.parametrize("place", ["", "0_Transformer"])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_read_from_any_file(read, form, place):
    files, tokens = FORMS[form]
    assert read(place, **files).tokens == tokens


def test_a_folder_without_a_tokenizer_has_none(read):
    assert read() is None


def test_merges_are_the_same_in_any_spelling(read):
    old = read(**{"tokenizer.json": {"model": {**BPE, "merges": ["a b"]}}})
    assert old.difference(read(**{"tokenizer.json": {"model": BPE}})) == ""


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        (Vocabulary({}, "BPE"), Vocabulary({}, "WordPiece"), "words by BPE, the other by WordPiece"),
        (
            Vocabulary({}, "BPE", merges=("a b", "c d")),
            Vocabulary({}, "BPE", merges=("a b", "c e", "f g")),
            r"merges differ \(2 and 3, first at number 2: 'c d', 'c e'\)",
        ),
        (
            Vocabulary({}, "BPE", merges=("a b",)),
            Vocabulary({}, "BPE", merges=("a b", "f g")),
            r"first at number 2: 'none', 'f g'",
        ),
        (
            Vocabulary({}, "BPE", {"byte level": True}),
            Vocabulary({}, "BPE", {"byte level": False}),
            r"byte level \(True, False\)",
        ),
        (
            Vocabulary({}, "Unigram", scores={"a": 0.0, "b": -1.0}),
            Vocabulary({}, "Unigram", scores={"a": 0.0, "b": -2.0}),
            "scores of 1 tokens differ",
        ),
        (Vocabulary({}, opaque=b"1"), Vocabulary({}, opaque=b"2"), "cannot be read"),
    ],
    ids=["kind", "merges", "more merges", "bytes", "scores", "unknown"],
)
def test_tokenizers_that_read_text_otherwise_are_told(own, other, message):
    assert own.difference(own) == ""
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(own.difference(other))


def test_a_tokenizer_of_unknown_form_has_no_tokens(read):
    assert read(**{"tokenizer.json": {"model": {"vocab": 3}}}).opaque

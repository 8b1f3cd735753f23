import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.parameters.aligned_folders import AlignedFolders, check_same_vocabularies

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def folder(name, tokens, rows=None, vocab="vocab.txt", **tensors):
    """A folder whose row for the n-th letter of the alphabet holds n, times what its name begins with."""
    pathlib.Path(name).mkdir()
    values = [float(ord(token) - ord("a")) for token in tokens] + [50.0] * ((rows or len(tokens)) - len(tokens))
    embedding = torch.tensor(values)[:, None].repeat(1, 2) + 100 * (ord(name[0]) - ord("a"))
    save_file({"wte.weight": embedding, **tensors}, f"{name}/model.safetensors")
    pathlib.Path(name, "config.json").write_text(json.dumps({"vocab_size": len(embedding)}))
    if vocab:
        pathlib.Path(name, vocab).write_text("\n".join(tokens))
    return name


def rows(*paths, **options):
    merged = merge_checkpoints(list(paths), "merged", **options)
    return load_file("merged/model.safetensors")["wte.weight"][:, 0].tolist(), merged.notes


def test_rows_are_merged_by_their_tokens():
    found, notes = rows(folder("a", "vwxyz"), folder("b", "zyxwv"))
    assert found == [71.0, 72.0, 73.0, 74.0, 75.0]
    assert notes == ["The tokenizers of a and b differ: 4 rows of b are moved to their tokens' rows."]


def test_a_token_that_a_model_lacks_counts_with_the_mean_of_those_that_have_it():
    found, notes = rows(folder("a", "xyz"), folder("b", "yx"), folder("c", "zuxy"), weights=[1.0, 5.0, 3.0])
    mean = [(value + 5 * (value + 100) + 3 * (value + 200)) / 9 for value in (23.0, 24.0)]
    assert found == pytest.approx([*mean, (25 + 3 * 225) / 4])
    assert "1 token ('z') that it lacks count with the mean of the models that have them." in notes[0]
    assert "1 token ('u') that a lacks are left out." in notes[1]


def test_rows_of_no_token_go_with_the_same_rows():
    assert rows(folder("a", "xy", 4), folder("b", "yx", 5))[0] == [73.0, 74.0, 100.0, 100.0]
    assert rows("b", "a", overwrite=True)[0] == [74.0, 73.0, 100.0, 100.0, 150.0]


def test_the_base_model_is_aligned_too():
    paths = [folder("b", "xyz"), folder("c", "xyz")]
    found, notes = rows(*paths, method="task_arithmetic", base=folder("a", "zyx"))
    direction = torch.tensor(found) - torch.tensor([23.0, 24.0, 25.0])
    torch.testing.assert_close(direction, direction[:1].expand(3))
    assert "b and a differ: 2 rows of a" in notes[0]


def test_a_tokenizer_only_in_some_folders_is_said():
    found, notes = rows(folder("a", "xy"), folder("b", "yx", vocab=None))
    assert found == [73.5, 73.5]
    assert notes == ["b has no tokenizer: its rows are taken to be for the tokens of a."]
    assert merge_checkpoints(["b", "a"], "turned").notes == [
        "b has no tokenizer: its rows are taken to be for the tokens of a."
    ]
    with pytest.raises(ValueError, match="b has no tokenizer, so that it is not known which one its rows are for"):
        merge_checkpoints(["b", "a", folder("c", "yx")], "other")


def test_tokenizers_of_different_kinds_are_refused_before_anything_is_written():
    merges = {"type": "BPE", "vocab": {"x": 0, "y": 1}, "merges": []}
    folder("a", "xy", other=torch.ones(1))
    folder("b", "xy", vocab=None, other=torch.ones(1))
    pathlib.Path("b/tokenizer.json").write_text(json.dumps({"model": merges}))
    with pytest.raises(ValueError, match=r"of a and b cannot be aligned: one divides words by WordPiece.*exclude"):
        rows("a", "b")
    assert not pathlib.Path("merged").exists()
    assert rows("a", "b", exclude=["wte"]) == ([23.0, 24.0], [])


def test_a_tensor_that_may_have_a_row_for_each_token_is_refused():
    paths = [folder("a", "xyz", odd=torch.ones(3, 5)), folder("b", "zyx", odd=torch.ones(3, 5))]
    with pytest.raises(ValueError, match=r"not known whether odd \[3, 5\] has a row for each of the 3 tokens"):
        rows(*paths)
    assert rows(*paths, exclude=["odd"])[0] == [73.0, 74.0, 75.0]


def test_different_tokenizers_whose_rows_are_not_known_are_refused():
    for name, tokens in {"a": "xyz", "b": "zyx"}.items():
        save_file({"odd": torch.ones(3, 5)}, f"{folder(name, tokens)}/model.safetensors")
        pathlib.Path(name, "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tensor of a is known to have a row for each token.*vocab_size"):
        merge_checkpoints(["a", "b"], "merged")


def test_models_of_one_tokenizer_are_not_moved():
    aligned = AlignedFolders([folder("a", "xyz"), folder("b", "xyz")], [1.0, 1.0])
    assert not aligned.moved
    assert aligned.notes == []


def test_token_ids_need_the_same_rows():
    with pytest.raises(ValueError, match="1 rows of b are moved.*With model and data, all models need the same"):
        check_same_vocabularies([folder("a", "xy"), folder("b", "y", 2)])
    check_same_vocabularies(["a", folder("c", "xy")])


KINDS = {
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=13, max_position_embeddings=8, **SIZES)
    ),
    "untied": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=13, max_position_embeddings=8, tie_word_embeddings=False, **SIZES)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=13, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2)
    ),
    "clip": lambda: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=13, max_position_embeddings=8, **SIZES, eos_token_id=12)
    ),
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_merged_with_its_permuted_self_computes_the_same(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    model.save_pretrained("a")
    order = torch.randperm(13)
    state = load_file("a/model.safetensors")
    pathlib.Path("b").mkdir()
    pathlib.Path("b/config.json").write_bytes(pathlib.Path("a/config.json").read_bytes())
    moved = {name: tensor[order] if len(tensor) == 13 else tensor for name, tensor in state.items()}
    assert any(not torch.equal(moved[name], state[name]) for name in state)
    save_file(moved, "b/model.safetensors", {"format": "pt"})
    letters = "abcdefghijklm"
    pathlib.Path("a/vocab.txt").write_text("\n".join(letters))
    pathlib.Path("b/vocab.txt").write_text("\n".join(letters[row] for row in order))
    merge_checkpoints(["a", "b"], "merged")
    ids = torch.tensor([[1, 5, 12]])
    more = {"decoder_input_ids": ids} if kind == "t5" else {}
    found, expected = (each(ids, **more)[0] for each in (type(model).from_pretrained("merged").eval(), model))
    torch.testing.assert_close(found, expected)

import hashlib
import json
import logging
import pathlib
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy import same

from lightning_odem.cli.command_line import main
from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.parameters.weights_writer import WeightsWriter

transformers = pytest.importorskip("transformers")
logging.getLogger("sentence_transformers").setLevel(logging.ERROR)

TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "unk_token": "a"}}


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def gpt(seed, vocab=24, **config):
    torch.manual_seed(seed)
    sizes = {"n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab, **sizes, **config)).eval()


def save(name, model, tokens="abc"):
    model.save_pretrained(name)
    words = {**TOKENIZER["model"], "vocab": {token: row for row, token in enumerate(tokens)}}
    pathlib.Path(name, "tokenizer.json").write_text(json.dumps({**TOKENIZER, "model": words}))
    return name


def load(name):
    return transformers.GPT2LMHeadModel.from_pretrained(name).eval()


def mean(*models):
    states = [model.state_dict() for model in models]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*") if path.is_file())


def test_a_folder_of_transformers_is_written_whole_and_loads_with_tied_weights():
    first, second = save("a", gpt(0)), save("b", gpt(1))
    merge_checkpoints([first, second], "merged")
    assert files("merged") == files("a")
    model = load("merged")
    torch.testing.assert_close(dict(model.state_dict()), mean(gpt(0), gpt(1)))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert json.loads(pathlib.Path("merged/tokenizer.json").read_text())["model"]["vocab"] == {"a": 0, "b": 1, "c": 2}


def test_what_is_not_the_model_does_not_come_along():
    save("a", gpt(0))
    for stale in ("optimizer.pt", "onnx/model.onnx", "checkpoint-5/config.json", ".git/config", "tf_model.h5"):
        path = pathlib.Path("a", stale)
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    pathlib.Path("a/code").mkdir()
    pathlib.Path("a/code/modeling.py").write_text("x = 1")
    merge_checkpoints(["a", save("b", gpt(1))], "merged")
    expected = ["code/modeling.py", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert files("merged") == expected


def test_the_readme_becomes_a_model_card():
    save("a", gpt(0))
    head = "---\nlicense: mit\nmodel-index:\n- name: a\n---\n"
    pathlib.Path("a/README.md").write_text(f"{head}# The first\nScores 99 %.\n")
    merge_checkpoints(["a", save("b", gpt(1))], "merged", "task_arithmetic", base=save("base", gpt(2)), weights=[1, 3])
    card = pathlib.Path("merged/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    for part in ("`task_arithmetic`", "| a | 1 |", "| b | 3 |", "Base model: base"):
        assert part in card
    for name in ("a", "b", "base"):
        digest = hashlib.sha256(pathlib.Path(name, "model.safetensors").read_bytes()).hexdigest()
        assert f"model.safetensors `{digest}`" in card
    assert "99" not in card


def test_shards_and_old_files_become_a_folder_that_loads():
    gpt(0).save_pretrained("a", max_shard_size="5KB")
    assert len(list(pathlib.Path("a").glob("*.safetensors"))) > 1
    second = gpt(1)
    second.config.save_pretrained("b")
    torch.save(second.state_dict(), "b/pytorch_model.bin")
    for names in (["a", "b"], ["b", "a"]):
        merge_checkpoints(names, "".join(names))
        torch.testing.assert_close(dict(load("".join(names)).state_dict()), mean(gpt(0), gpt(1)))
    assert files("ab") == ["config.json", "generation_config.json", "model.safetensors"]


def test_an_excluded_embedding_is_the_first_folders():
    save("a", gpt(0))
    merge_checkpoints(["a", save("grown", gpt(1, vocab=26), "abcd")], "merged", exclude=["transformer.wte"])
    model = load("merged")
    assert same({"wte": model.transformer.wte.weight}, {"wte": gpt(0).transformer.wte.weight})
    torch.testing.assert_close(
        model.transformer.wpe.weight, (gpt(0).transformer.wpe.weight + gpt(1, 26).transformer.wpe.weight) / 2
    )


def test_a_head_of_its_own_goes_first():
    untied = gpt(0, tie_word_embeddings=False)
    paths = [save("untied", untied), save("tied", gpt(1))]
    merge_checkpoints(paths, "merged")
    torch.testing.assert_close(dict(load("merged").state_dict()), mean(untied, gpt(1)))
    with pytest.raises(ValueError, match=r"tied ties its output weights to its embedding.*Give untied first"):
        merge_checkpoints(paths[::-1], "other")
    assert not pathlib.Path("other").exists()


def test_vocabularies_of_other_sizes_without_a_tokenizer_are_refused_with_the_way_out():
    gpt(1, vocab=26).save_pretrained("b")
    with pytest.raises(ValueError, match=r"have 24 and 26 tokens.*resize_token_embeddings"):
        merge_checkpoints([save("a", gpt(0)), "b"], "merged")


def test_the_same_rows_for_other_tokens_are_moved_and_said():
    merged = merge_checkpoints([save("a", gpt(0), "abc"), save("b", gpt(1), "acb")], "merged")
    own, other = gpt(0).transformer.wte.weight, gpt(1).transformer.wte.weight
    model = load("merged")
    torch.testing.assert_close(model.transformer.wte.weight[:3], (own[:3] + other[[0, 2, 1]]) / 2)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert merged.notes == ["The tokenizers of a and b differ: 2 rows of b are moved to their tokens' rows."]
    merge_checkpoints(["a", save("c", gpt(1), "abcd")], "more")
    merge_checkpoints(["a", "b"], "excluded", exclude=["transformer.wte"])
    assert same({"wte": load("excluded").transformer.wte.weight}, {"wte": own})


def test_a_model_in_a_sub_folder_is_written_there():
    for seed, name in enumerate("ab"):
        gpt(seed).save_pretrained(f"{name}/0_Transformer")
        pathlib.Path(name, "modules.json").write_text('[{"idx": 0, "path": "0_Transformer", "type": "x.Transformer"}]')
    merge_checkpoints(["a", "b"], "merged")
    assert files("merged") == files("a")
    torch.testing.assert_close(dict(load("merged/0_Transformer").state_dict()), mean(gpt(0), gpt(1)))
    merge_checkpoints(["a", save("c", gpt(1))], "mixed")
    assert same(*(load_file(f"{name}/0_Transformer/model.safetensors") for name in ("mixed", "merged")))


def test_excluded_tied_tensors_of_an_old_file_are_written():
    for seed, name in enumerate("ab"):
        gpt(seed).config.save_pretrained(name)
        torch.save(gpt(seed).state_dict(), f"{name}/pytorch_model.bin")
    merge_checkpoints(["a", "b"], "merged", exclude=["transformer.wte", "lm_head"])
    assert same({"wte": load("merged").transformer.wte.weight}, {"wte": gpt(0).transformer.wte.weight})


def test_the_file_of_another_library_keeps_its_name():
    for seed, name in enumerate("ab"):
        pathlib.Path(name).mkdir()
        pathlib.Path(name, "open_clip_config.json").write_text("{}")
        save_file({"w": torch.full((2,), float(seed))}, f"{name}/open_clip_model.safetensors")
    merge_checkpoints(["a", "b"], "merged")
    assert files("merged") == files("a")
    assert load_file("merged/open_clip_model.safetensors")["w"].tolist() == [0.5, 0.5]


def test_a_link_that_leads_nowhere_is_left_out():
    save("a", gpt(0))
    pathlib.Path("a/lost.json").symlink_to("nowhere")
    merge_checkpoints(["a", save("b", gpt(1))], "merged")
    assert files("merged") == files("b")


def test_settings_that_differ_are_said(capsys):
    paths = [save("a", gpt(0)), save("b", gpt(1, layer_norm_epsilon=0.1))]
    merged = merge_checkpoints(paths, "merged")
    assert len(merged.notes) == 1
    assert "config.json of b differs from that of a" in merged.notes[0]
    assert "layer_norm_epsilon (1e-05, 0.1)" in merged.notes[0]
    main(["merge", *paths, "--output", "again"])
    shown = capsys.readouterr().out
    assert merged.notes[0] in shown
    assert shown.endswith("Merged weights: again\n")


def test_a_folder_with_other_files_is_never_replaced():
    paths = [save("a", gpt(0)), save("b", gpt(1))]
    merge_checkpoints(paths, "merged")
    with pytest.raises(FileExistsError, match="merged exists already"):
        merge_checkpoints(paths, "merged")
    merge_checkpoints(["a", "a"], "merged", overwrite=True)
    assert same(load_file("merged/model.safetensors"), load_file("a/model.safetensors"))
    pathlib.Path("merged/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"would not write: notes\.txt"):
        merge_checkpoints(paths, "merged", overwrite=True)
    with pytest.raises(ValueError, match="would overwrite one of the checkpoints"):
        merge_checkpoints(["merged", "a"], ".", overwrite=True)


def test_a_folder_whose_weights_are_not_what_was_to_be_written_gets_no_name(monkeypatch):
    paths = [save("a", gpt(0)), save("b", gpt(1))]

    put = WeightsWriter._put

    def damaged(writer, place, content):
        there = writer._start + writer._places["transformer.ln_f.bias"][0]
        put(writer, place, content + 1 if place == there else content)

    monkeypatch.setattr(WeightsWriter, "_put", damaged)
    with pytest.raises(OSError, match=r"transformer\.ln_f\.bias did not come back"):
        merge_checkpoints(paths, "merged")
    assert sorted(path.name for path in pathlib.Path().iterdir()) == ["a", "b"]


# ------------------------------------------------------------------------------------------- sentence-transformers

SENTENCES = ["a b", "b c c", "c"]


def sentence_model(seed, dense=False):
    st = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=8, max_position_embeddings=16, **sizes))
    folder = pathlib.Path(f"bert_{seed}")
    model.save_pretrained(folder)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    transformers.BertTokenizerFast(vocab={token: row for row, token in enumerate(tokens)}).save_pretrained(folder)
    modules = [models.Transformer(str(folder)), models.Pooling(16)]
    modules += [models.Dense(16, 4)] if dense else []
    return st.SentenceTransformer(modules=[*modules, models.Normalize()], device="cpu")


@pytest.mark.parametrize("dense", [False, True])
def test_a_sentence_model_merged_with_itself_gives_its_embeddings(dense):
    st = pytest.importorskip("sentence_transformers")
    model = sentence_model(0, dense)
    model.save_pretrained("a")
    shutil.copytree("a", "b")
    checked = merge_checkpoints(["a", "b"], "merged").checked
    assert checked.startswith(f"Checked by loading with sentence-transformers {st.__version__}")
    assert checked.endswith("its outputs for 3 sentences are those of the merged weights.")
    expected = torch.tensor(model.encode(SENTENCES))
    found = torch.tensor(st.SentenceTransformer("merged", device="cpu").encode(SENTENCES))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert files("merged") == files("a")


def test_modules_in_sub_folders_are_merged():
    st = pytest.importorskip("sentence_transformers")
    for seed in range(2):
        sentence_model(seed, dense=True).save_pretrained(f"m{seed}")
    merge_checkpoints(["m0", "m1"], "merged")
    found, *each = (load_file(f"{name}/2_Dense/model.safetensors") for name in ("merged", "m0", "m1"))
    torch.testing.assert_close(found, {name: (each[0][name] + each[1][name]) / 2 for name in found})
    assert st.SentenceTransformer("merged", device="cpu").encode(SENTENCES).shape == (3, 4)


def test_modules_outside_the_folder_are_refused():
    save("a", gpt(0))
    pathlib.Path("a/modules.json").write_text('[{"path": "../b"}]')
    with pytest.raises(ValueError, match=r"names modules outside its folder: \.\./b"):
        merge_checkpoints(["a", save("b", gpt(1))], "merged")


def test_the_weights_say_how_they_were_made():
    merge_checkpoints([save("a", gpt(0)), save("b", gpt(1))], "merged")
    with safe_open("merged/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tasks"]) == ["a", "b"]


def test_the_weights_name_the_hash_of_each_shard():
    gpt(0).save_pretrained("a", max_shard_size="5KB")
    shards = sorted(pathlib.Path("a").glob("*.safetensors"))
    merge_checkpoints(["a", save("b", gpt(1))], "merged")
    with safe_open("merged/model.safetensors", "pt") as file:
        found = json.loads(file.metadata()["sha256"])
    assert found["a"] == {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards}
    assert list(found["b"]) == ["model.safetensors"]


def test_names_that_only_the_first_stores_are_kept():
    save_file({"w": torch.zeros(2, 2), "v": torch.ones(3)}, "b.safetensors")
    pathlib.Path("a").mkdir()
    pathlib.Path("a/config.json").write_text("{}")
    save_file({"model.w": torch.ones(2, 2), "model.v": torch.zeros(3)}, "a/model.safetensors")
    merge_checkpoints(["a", "b.safetensors"], "merged")
    expected = {"model.w": torch.full((2, 2), 0.5), "model.v": torch.full((3,), 0.5)}
    assert same(load_file("merged/model.safetensors"), expected)

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_odem.cli.command_line import main
from lightning_odem.cli.extract import extract_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
IDS = torch.tensor([[1, 5, 7]])


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


KINDS = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=12, max_position_embeddings=8, **SIZES)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=12, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    ),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(image_size=16, patch_size=8, **SIZES), add_pooling_layer=False
    ),
}


def tune(kind, rank=2, only=""):
    """A base model, and one whose linear weights (of a name) differ from it by updates of a rank."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    model.save_pretrained("base")
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and only in name and "lm_head" not in name:
            rows, columns = module.weight.shape
            module.weight.data += torch.randn(rows, rank) @ torch.randn(rank, columns) / 4
    model.save_pretrained("tuned")
    return model


def adapted(kind):
    return peft.PeftModel.from_pretrained(type(KINDS[kind]()).from_pretrained("base"), "adapter").eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_of_the_rank_comes_back_as_an_adapter_of_peft(kind):
    model = tune(kind)
    result = extract_adapter("tuned", "base", "adapter", rank=2)
    assert result.cut < 1e-4
    assert result.left_out == {}
    assert result.checked.startswith(f"Checked by loading with peft {peft.__version__}")
    inputs = torch.rand(1, 3, 16, 16) if kind == "vit" else IDS
    torch.testing.assert_close(adapted(kind)(inputs)[0], model(inputs)[0], rtol=1e-3, atol=1e-3)


def test_what_the_rank_cannot_hold_is_the_least_and_said(capsys):
    tune("bert", rank=3, only="query")
    main(["extract", "--model", "tuned", "--base", "base", "--rank", "2", "--output", "adapter"])
    name = "bert.encoder.layer.0.attention.self.query"
    own, other = (load_file(f"{folder}/model.safetensors")[f"{name}.weight"] for folder in ("base", "tuned"))
    sizes = torch.linalg.svdvals(other - own)
    share = float(sizes[2] / sizes.norm())
    shown = capsys.readouterr().out
    assert f"Rank 2 holds all of the difference of 1 linear weights but {share:.2%}" in shown
    assert shown.endswith("Adapter: adapter\n")
    found = adapted("bert").get_submodule(f"base_model.model.{name}").get_delta_weight("default")
    left, sizes, right = torch.linalg.svd(other - own)
    torch.testing.assert_close(found.detach(), (left[:, :2] * sizes[:2]) @ right[:2], rtol=1e-3, atol=1e-4)


def test_other_tensors_that_differ_are_said_with_their_share():
    tune("bert", only="query")
    state = load_file("tuned/model.safetensors")
    state["bert.embeddings.word_embeddings.weight"] += 0.5
    state["bert.encoder.layer.0.output.LayerNorm.bias"] -= 0.25
    save_file(state, "tuned/model.safetensors", {"format": "pt"})
    result = extract_adapter("tuned", "base", "adapter", rank=2)
    assert result.left_out == pytest.approx(
        {
            "bert.embeddings.word_embeddings.weight": 0.5 * (12 * 16) ** 0.5,
            "bert.encoder.layer.0.output.LayerNorm.bias": 0.25 * 16**0.5,
        }
    )
    assert "2 other tensors differ and are left out" in result.notes[1]
    assert f"{result.share_left_out:.2%} of the whole difference" in result.notes[1]
    query = "bert.encoder.layer.0.attention.self.query.weight"
    held = float((state[query] - load_file("base/model.safetensors")[query]).norm())
    rest = sum(norm**2 for norm in result.left_out.values()) ** 0.5
    assert result.share_left_out == pytest.approx(rest / (held**2 + rest**2) ** 0.5, rel=1e-4)


def test_a_head_that_the_base_does_not_have_is_said():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=12, max_position_embeddings=8, **SIZES)
    model = transformers.BertForSequenceClassification(config)
    model.bert.save_pretrained("base")
    model.bert.encoder.layer[0].output.dense.weight.data += torch.randn(16, 20)
    model.save_pretrained("tuned")
    result = extract_adapter("tuned", "base", "adapter", rank=16)
    assert result.modules == ["encoder.layer.0.output.dense"]
    assert "What only one of the models has is left out: unexpected keys: classifier." in result.notes[-1]


def test_a_tensor_that_one_folder_lacks_is_no_difference():
    tune("bert", only="query")
    state = load_file("tuned/model.safetensors")
    save_file(
        {name: state[name] for name in state if "pooler" not in name}, "tuned/model.safetensors", {"format": "pt"}
    )
    result = extract_adapter("tuned", "base", "adapter", rank=2)
    assert result.left_out == {}
    assert "missing keys: bert.pooler.dense.bias" in result.notes[-1]


def test_what_does_not_fit_is_refused_and_nothing_is_written():
    tune("bert", only="nothing")
    with pytest.raises(ValueError, match="No linear layer of tuned differs from that of base"):
        extract_adapter("tuned", "base", "adapter")
    with pytest.raises(ValueError, match="would overwrite one of the models"):
        extract_adapter("tuned", "base", "base", overwrite=True)
    pathlib.Path("base").rename("other")
    pathlib.Path("bare").mkdir()
    save_file({"w": torch.ones(1)}, "bare/model.safetensors")
    with pytest.raises(ValueError, match="bare has no config.json of transformers"):
        extract_adapter("tuned", "bare", "adapter")
    with pytest.raises(ValueError, match="rank"):
        extract_adapter("tuned", "other", "adapter", rank=0)
    config = transformers.BertConfig(vocab_size=13, max_position_embeddings=8, **SIZES)
    transformers.BertForSequenceClassification(config).save_pretrained("grown")
    with pytest.raises(ValueError, match="word_embeddings"):
        extract_adapter("grown", "other", "adapter")
    assert not pathlib.Path("adapter").exists()


def test_an_adapter_is_replaced_only_if_asked_and_nothing_else_ever():
    tune("bert", only="query")
    extract_adapter("tuned", "base", "adapter", rank=1)
    with pytest.raises(FileExistsError, match="adapter exists already"):
        extract_adapter("tuned", "base", "adapter", rank=2)
    extract_adapter("tuned", "base", "adapter", rank=2, overwrite=True)
    assert json.loads(pathlib.Path("adapter/adapter_config.json").read_text())["r"] == 2
    pathlib.Path("else").mkdir()
    with pytest.raises(FileExistsError, match="else exists already"):
        extract_adapter("tuned", "base", "else", overwrite=True)


def test_large_matrices_get_nearly_the_best_update():
    from lightning_odem.cli.extract import _factors

    torch.manual_seed(0)
    difference = torch.randn(2100, 30) @ torch.diag(0.7 ** torch.arange(30.0)) @ torch.randn(30, 2100)
    first, second = _factors(difference, 8)
    best = float(torch.svd_lowrank(difference, q=60, niter=8)[1][8:].norm())
    assert float((difference - second @ first).norm()) == pytest.approx(best, rel=1e-3)

import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_odem.cli.command_line import main
from lightning_odem.cli.merge import merge_checkpoints

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
IDS = torch.tensor([[1, 5, 7]])


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=12, max_position_embeddings=8, **SIZES)
    transformers.BertForSequenceClassification(config).save_pretrained("bert")
    config = transformers.GPT2Config(vocab_size=12, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")


CLASSES = {"bert": "BertForSequenceClassification", "gpt2": "GPT2LMHeadModel"}


def load(base, folder=None):
    return getattr(transformers, CLASSES[base]).from_pretrained(folder or base).eval()


def save(name, base, seed=1, **config):
    options = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False} | config
    adapted = peft.get_peft_model(load(base), peft.LoraConfig(**options))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    adapted.save_pretrained(name)
    return name


KINDS = {
    "linear": ("bert", {}),
    "heads and biases": ("bert", {"modules_to_save": ["classifier"], "lora_bias": True}),
    "embedding": ("bert", {"target_modules": ["query", "word_embeddings"]}),
    "turned": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_folded_into_its_base_computes_what_peft_computes(kind):
    base, config = KINDS[kind]
    save("a", base, **config)
    merged = merge_checkpoints(["a", "a"], "whole", tasks=["x", "y"], adapter_into=base)
    assert merged.notes == []
    assert merged.checked.endswith("are those of the merged weights.")
    expected = peft.PeftModel.from_pretrained(load(base), "a").eval()
    torch.testing.assert_close(load(base, "whole")(IDS)[0], expected(IDS)[0], rtol=1e-4, atol=1e-4)


def test_merged_updates_are_folded_without_a_cut(capsys):
    save("a", "bert"), save("b", "bert", 2)
    main(["merge", "a", "b", "--weights", "[1,3]", "--adapter-into", "bert", "--output", "whole"])
    shown = capsys.readouterr().out
    assert "discarded" not in shown
    assert shown.endswith("Merged weights: whole\n")
    name = "bert.encoder.layer.0.attention.self.query"
    layers = {
        each: peft.PeftModel.from_pretrained(load("bert"), each).get_submodule(f"base_model.model.{name}")
        for each in "ab"
    }
    expected = sum(share * layers[each].get_delta_weight("default") for each, share in {"a": 0.25, "b": 0.75}.items())
    found, own = (load_file(f"{each}/model.safetensors")[f"{name}.weight"] for each in ("whole", "bert"))
    torch.testing.assert_close(found, own + expected.detach(), rtol=1e-4, atol=1e-4)
    assert pathlib.Path("whole/config.json").read_bytes() == pathlib.Path("bert/config.json").read_bytes()


def test_half_precision_of_the_base_stays():
    save("a", "bert")
    state = {name: tensor.bfloat16() for name, tensor in load_file("bert/model.safetensors").items()}
    save_file(state, "bert/model.safetensors", {"format": "pt"})
    merge_checkpoints(["a"], "whole", adapter_into="bert")
    assert {tensor.dtype for tensor in load_file("whole/model.safetensors").values()} == {torch.bfloat16}


def test_another_base_is_refused_before_the_merge():
    save("a", "bert")
    with pytest.raises(ValueError, match=r"a does not fit the base model gpt2: .*query.weight is not in it"):
        merge_checkpoints(["a"], "whole", adapter_into="gpt2")
    with pytest.raises(ValueError, match="adapter_into is for adapters, but bert is none"):
        merge_checkpoints(["bert"], "whole", adapter_into="bert")
    assert not pathlib.Path("whole").exists()


def test_adapters_that_change_their_base_are_refused():
    adapted = peft.get_peft_model(
        load("bert"), peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa")
    )
    adapted.save_pretrained("a")
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes the base weights"):
        merge_checkpoints(["a"], "whole", adapter_into="bert")

import json
import pathlib
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from lightning_odem.cli.load_check import check_by_loading
from lightning_odem.cli.merge import merge_checkpoints

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
PICTURES = {"image_size": 16, "patch_size": 8, **SIZES}


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def clip():
    text = {"vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 29, **SIZES}
    config = transformers.CLIPConfig(text_config=text, vision_config=PICTURES, projection_dim=8)
    return transformers.CLIPModel(config)


KINDS = {
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=30, max_position_embeddings=16, **SIZES)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2)
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**PICTURES)),
    "clip": clip,
}
INPUTS = {"vit": "a photograph", "clip": "3 sentences and a photograph"}


def save(name, kind, seed=0):
    torch.manual_seed(seed)
    KINDS[kind]().save_pretrained(name)
    return name


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_of_transformers_is_loaded_and_computes(kind):
    merged = merge_checkpoints([save("a", kind), save("b", kind, 1)], "merged")
    inputs = INPUTS.get(kind, "3 sentences")
    assert merged.checked.startswith(f"Checked by loading with transformers {transformers.__version__} (")
    assert merged.checked.endswith(f"its outputs for {inputs} are those of the merged weights.")
    own, other, found = (load_file(f"{name}/model.safetensors") for name in ("a", "b", "merged"))
    torch.testing.assert_close(found, {name: (own[name] + other[name]) / 2 for name in own})


def test_shards_are_loaded():
    KINDS["bert"]().save_pretrained("a", max_shard_size="5KB")
    assert pathlib.Path("a/model.safetensors.index.json").exists()
    assert "are those of the merged weights" in merge_checkpoints(["a", save("b", "bert")], "merged").checked


def test_a_merged_folder_of_timm_is_loaded():
    from timm.models._hub import save_for_hf

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = timm.create_model("test_vit", num_classes=5)
        save_for_hf(model, name, model_config={"num_classes": 5}, safe_serialization=True)
    merged = merge_checkpoints(["a", "b"], "merged")
    assert merged.checked.startswith(f"Checked by loading with timm {timm.__version__} (VisionTransformer)")
    assert merged.checked.endswith("its outputs for a photograph are those of the merged weights.")
    assert timm.create_model("local-dir:merged", pretrained=True).num_classes == 5


def test_a_merged_adapter_is_loaded_on_its_base():
    peft = pytest.importorskip("peft")
    save("base", "bert")
    for seed, name in enumerate("ab"):
        model = transformers.BertForSequenceClassification.from_pretrained("base")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
        torch.manual_seed(seed)
        model.save_pretrained(name)
    merged = merge_checkpoints(["a", "b"], "merged")
    assert merged.checked.startswith(f"Checked by loading with peft {peft.__version__}")
    assert merged.checked.endswith("its outputs for 3 sentences are those of the merged weights.")
    shutil.rmtree("base")
    again = merge_checkpoints(["a", "b"], "again")
    assert again.checked == "Not checked by loading: its base model base is no folder here."


def test_models_of_different_precisions_are_checked():
    paths = [save("a", "gpt2"), save("b", "gpt2", 1)]
    state = {name: tensor.bfloat16() for name, tensor in load_file("a/model.safetensors").items()}
    save_file(state, "a/model.safetensors", {"format": "pt"})
    config = json.loads(pathlib.Path("a/config.json").read_text())
    for dtype in ({}, {"dtype": "bfloat16"}):
        pathlib.Path("a/config.json").write_text(
            json.dumps({key: value for key, value in config.items() if "dtype" not in key} | dtype)
        )
        assert merge_checkpoints(paths, "merged", overwrite=True).checked.startswith("Checked by loading with")


def test_code_in_a_folder_is_not_run():
    pytest.importorskip("sentence_transformers")
    code = "import pathlib\npathlib.Path('ran').touch()\nclass Own: pass\n"
    for name in "ab":
        save(name, "bert")
        pathlib.Path(name, "own.py").write_text(code)
        config = json.loads(pathlib.Path(name, "config.json").read_text())
        config |= {
            "architectures": ["Own"],
            "model_type": "own",
            "auto_map": {"AutoModel": "own.Own", "AutoConfig": "own.Own"},
        }
        pathlib.Path(name, "config.json").write_text(json.dumps(config))
    assert merge_checkpoints(["a", "b"], "merged").checked.startswith(
        "Not checked by loading: a cannot be loaded either"
    )
    for name in "ab":
        pathlib.Path(name, "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "own.Own"}]')
    checked = merge_checkpoints(["a", "b"], "again").checked
    assert (
        checked == "Not checked by loading: modules.json names classes that are not of sentence-transformers (own.Own)."
    )
    assert not pathlib.Path("ran").exists()


def draft(change):
    """A folder as a merge would write it, with a fault."""
    shutil.copytree(save("a", "gpt2"), "draft")
    state = load_file("a/model.safetensors")
    change(state)
    return check_by_loading(pathlib.Path("draft"), pathlib.Path("a"), {"": state})


def test_a_tensor_that_is_not_in_the_file_is_found():
    def drop(state):
        save_file({name: state[name] for name in state if "ln_f.bias" not in name}, "draft/model.safetensors")

    with pytest.raises(ValueError, match=r"does not load the merged folder as a whole.*missing keys: .*ln_f\.bias"):
        draft(drop)


def test_weights_that_are_not_the_merged_ones_are_found():
    def shift(state):
        state["transformer.wpe.weight"] += 1

    with pytest.raises(ValueError, match=r"loads other values than the merged ones.*transformer\.wpe\.weight"):
        draft(shift)


def test_a_configuration_that_computes_something_else_is_found():
    def change(state):
        file = pathlib.Path("draft/config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "layer_norm_epsilon": 10.0}))

    with pytest.raises(ValueError, match="computes other outputs from the merged folder"):
        draft(change)


def test_a_merged_model_that_gives_no_numbers_gets_no_name():
    paths = [save("a", "gpt2"), save("b", "gpt2", 1)]
    for path in paths:
        state = load_file(f"{path}/model.safetensors")
        state["transformer.ln_f.weight"] += 3e38
        save_file(state, f"{path}/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="gives no finite numbers"):
        merge_checkpoints(paths, "merged", weights=[1e-3, 1])
    assert not pathlib.Path("merged").exists()


def test_a_folder_that_its_library_does_not_know_is_said():
    for name in "ab":
        pathlib.Path(name).mkdir()
        save_file({"w": torch.ones(2)}, f"{name}/model.safetensors")
        pathlib.Path(name, "config.json").write_text('{"model_type": "nothing"}')
    assert "a cannot be loaded either (ValueError" in merge_checkpoints(["a", "b"], "merged").checked
    pathlib.Path("a/config.json").write_text("{}")
    found = merge_checkpoints(["a", "b"], "again").checked
    assert found == "Not checked by loading: no library is known for its configuration."

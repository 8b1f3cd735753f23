import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.parameters.adapter_folders import AdapterFolders

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
QUERY = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def base():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=12, max_position_embeddings=8, **SIZES)
    return transformers.BertModel(config, add_pooling_layer=False)


def save(name, seed=1, **config):
    options = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False} | config
    adapted = peft.get_peft_model(base(), peft.LoraConfig(**options))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    adapted.save_pretrained(name)
    return name


def change(name, **settings):
    file = pathlib.Path(name, "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return name


def updates(name):
    """What peft adds to the weights."""
    adapted = peft.PeftModel.from_pretrained(base(), name)
    layers = {layer: module for layer, module in adapted.named_modules() if hasattr(module, "get_delta_weight")}
    return {layer: module.get_delta_weight("default").detach() for layer, module in layers.items()}


def best(matrix, rank):
    left, sizes, right = torch.linalg.svd(matrix.double())
    return ((left[:, :rank] * sizes[:rank]) @ right[:rank]).float()


DIFFERENT = {
    "the same": {},
    "rank": {"r": 5},
    "alpha": {"lora_alpha": 3},
    "rank-stabilised": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"query": 4}, "alpha_pattern": {r"layer\.\d.*value": 5}},
    "fewer modules": {"target_modules": ["value"]},
    "more modules": {"target_modules": ["query", "key", "value", "dense"]},
    "embeddings": {"target_modules": ["query", "word_embeddings"]},
}


@pytest.mark.parametrize("swapped", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("different", DIFFERENT)
def test_the_merged_adapter_is_the_best_of_the_firsts_rank(different, swapped):
    paths = [save("a"), save("b", 2, **DIFFERENT[different])]
    first, second = paths[::-1] if swapped else paths
    merge_checkpoints([first, second], "merged", weights=[1, 3])
    own, other, found = updates(first), updates(second), updates("merged")
    assert found.keys() == own.keys() | other.keys()
    config = peft.LoraConfig.from_pretrained(first)
    for layer, update in found.items():
        expected = own.get(layer, torch.zeros(())) / 4 + other.get(layer, torch.zeros(())) * 3 / 4
        rank = 4 if "query" in layer and config.rank_pattern else config.r
        torch.testing.assert_close(update, best(expected, rank), rtol=1e-4, atol=1e-4)


def test_an_adapter_merged_with_itself_is_the_same_and_nothing_is_said():
    merged = merge_checkpoints([save("a"), "a"], "merged", tasks=["x", "y"])
    torch.testing.assert_close(updates("merged"), updates("a"))
    assert merged.notes == []
    assert sorted(path.name for path in pathlib.Path("merged").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_what_the_rank_cannot_hold_is_said():
    merged = merge_checkpoints([save("a"), save("b", 2)], "merged")
    whole = {layer: (first + updates("b")[layer]) / 2 for layer, first in updates("a").items()}
    lost = sum((update - whole[layer]).square().sum() for layer, update in updates("merged").items())
    share = (lost / sum(update.square().sum() for update in whole.values())).sqrt()
    assert merged.notes == [
        f"The rank of a holds all of the merged updates but {share:.2%} (by norm), which is discarded."
    ]


def test_methods_that_need_a_base_take_adapters_as_they_are():
    merge_checkpoints([save("a", r=4), save("b", 2)], "merged", "task_arithmetic")
    assert updates("merged").keys() == updates("a").keys()


def test_other_weights_of_adapters_are_averaged():
    options = {"modules_to_save": ["output.dense"], "lora_bias": True, "bias": "none"}
    paths = [save("a", **options), save("b", 2, **options, lora_alpha=32)]
    merge_checkpoints(paths, "merged")
    merged, a, b = (load_file(f"{name}/adapter_model.safetensors") for name in ("merged", "a", "b"))
    assert merged.keys() == a.keys()
    saved = [name for name in merged if "dense" in name]
    assert saved
    for name in saved:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)
    name = f"{QUERY}.lora_B.bias"
    torch.testing.assert_close(merged[name] * 4, (a[name] * 4 + b[name] * 16) / 2)
    with pytest.raises(ValueError, match="the base model, which this merge does not have"):
        merge_checkpoints(paths, "other", "task_arithmetic")


def test_updates_beyond_the_rows_of_all_adapters_are_cut_to_their_best():
    adapters = AdapterFolders([save("a"), save("b", 2)])
    torch.manual_seed(0)
    updates = {name: torch.randn_like(update) for name, update in adapters.read("a").items()}
    factors, cut = adapters.factors(updates)
    expected = {name: best(update, 2) for name, update in updates.items()}
    for name, update in expected.items():
        found = factors[name.replace("lora_A", "lora_B")] @ factors[name] * 4
        torch.testing.assert_close(found, update, rtol=1e-4, atol=1e-4)
    whole, left = torch.cat([*updates.values()]), torch.cat([*expected.values()])
    assert cut == pytest.approx(float((whole - left).norm() / whole.norm()), rel=1e-4)


def test_a_base_adapter_is_where_its_tasks_began():
    options = {"modules_to_save": ["output.dense"]}
    paths = [save("a", **options), save("b", 2, **options)]
    merge_checkpoints(paths, "merged", "task_arithmetic", base=save("base", 3, **options))
    merged, base, *tasks = (load_file(f"{name}/adapter_model.safetensors") for name in ("merged", "base", "a", "b"))
    name = next(name for name in merged if "dense.weight" in name)
    direction = sum(task[name] - base[name] for task in tasks)
    moved = merged[name] - base[name]
    assert torch.cosine_similarity(moved.flatten(), direction.flatten(), dim=0) > 0.9999


def test_convolutions_are_merged():
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3), torch.nn.Conv1d(5, 7, 3))

    for seed, name in enumerate("ab"):
        adapted = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
        torch.manual_seed(seed)
        for parameter in adapted.parameters():
            parameter.data = torch.randn_like(parameter)
        adapted.save_pretrained(name)
    merge_checkpoints(["a", "b"], "merged")
    found, a, b = (
        [
            layer.get_delta_weight("default").detach()
            for layer in peft.PeftModel.from_pretrained(model(), name).base_model.model
        ]
        for name in ("merged", "a", "b")
    )
    for update, first, second in zip(found, a, b, strict=True):
        expected = best(((first + second) / 2).flatten(1), 2)
        torch.testing.assert_close(update.flatten(1), expected, rtol=1e-4, atol=1e-4)


def test_an_excluded_update_that_the_first_has_not_is_zero():
    merge_checkpoints([save("a"), save("b", 2, target_modules=["key", "query"])], "merged", exclude=["*.key.*"])
    found = updates("merged")
    assert not found[QUERY.replace("query", "key")].any()
    assert found[QUERY].any()


def test_excluded_updates_are_the_first_adapters():
    merge_checkpoints([save("a"), save("b", 2)], "merged", exclude=["*.query.*"])
    found, own = updates("merged"), updates("a")
    assert torch.equal(found[QUERY], own[QUERY])
    assert not torch.allclose(found[QUERY.replace("query", "value")], own[QUERY.replace("query", "value")])


def test_half_precision_stays():
    for seed, name in enumerate("ab"):
        file = f"{save(name, seed)}/adapter_model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file)
    merge_checkpoints(["a", "b"], "merged")
    assert {value.dtype for value in load_file("merged/adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"has use_dora .*DoRA.*merge_and_unload"),
        ({"peft_type": "LOHA"}, r"type LOHA.*merge_and_unload"),
        ({"base_model_name_or_path": "bert"}, r"adapter of None, b of 'bert'.*write one of them"),
        ({"fan_in_fan_out": True}, r"differ in fan_in_fan_out \(False, True\)"),
        ({"init_lora_weights": "pissa"}, r"differ in init_lora_weights"),
        ({"something_new": 3}, r"differ in something_new \(None, 3\)"),
        ({"r": 3}, r"no factors of rank 3, which its adapter_config.json says"),
        ({"lora_alpha": 0}, r"lora_alpha 0; a positive number is needed"),
    ],
    ids=["dora", "loha", "base", "orientation", "pissa", "unknown", "rank", "alpha"],
)
def test_what_cannot_be_merged_rightly_is_refused(settings, message):
    paths = [save("a"), change(save("b", 2), **settings)]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        merge_checkpoints(paths, "merged")
    assert not pathlib.Path("merged").exists()


def test_dora_of_peft_is_refused():
    with pytest.raises(ValueError, match="DoRA"):
        merge_checkpoints([save("a", use_dora=True), save("b", 2, use_dora=True)], "merged")


def test_adapters_and_whole_models_are_not_mixed():
    base().save_pretrained("whole")
    with pytest.raises(ValueError, match=r"a is an adapter, whole is none.*merge_and_unload"):
        merge_checkpoints([save("a"), "whole"], "merged")


def test_a_file_as_output_is_refused():
    with pytest.raises(ValueError, match="is a folder, since a file does not say the scale"):
        merge_checkpoints([save("a"), "a"], "merged.safetensors", tasks=["x", "y"])


def test_an_incomplete_adapter_is_refused():
    file = f"{save('a')}/adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "query.lora_B" not in name}, file)
    with pytest.raises(ValueError, match=r"query.lora_A.weight, but not .*query.lora_B.weight"):
        AdapterFolders(["a"])


def mean_of(*names):
    found = [updates(name) for name in names]
    return {layer: sum(each[layer] for each in found) / len(found) for layer in found[0]}


@pytest.mark.parametrize("rank", [1, 4])
def test_the_merged_adapter_gets_the_rank_asked_for(rank):
    paths = [save("a", 1), save("b", 2, rank_pattern={"value": 3})]
    merge_checkpoints(paths, "merged", rank=rank)
    for layer, update in mean_of(*paths).items():
        torch.testing.assert_close(updates("merged")[layer], best(update, rank), rtol=1e-4, atol=1e-5)
    assert json.loads(pathlib.Path("merged", "adapter_config.json").read_text())["r"] == rank


@pytest.mark.parametrize("energy", [0.6, 0.95, 1.0])
def test_each_module_gets_the_smallest_rank_that_keeps_the_energy(energy):
    paths = [save("a", 1), save("b", 2, r=3, use_rslora=True)]
    merge_checkpoints(paths, "merged", energy=energy)
    found = updates("merged")
    for layer, update in mean_of(*paths).items():
        shares = [1 - ((update - best(update, rank)).norm() / update.norm()) ** 2 for rank in range(6)]
        rank = next(rank for rank, share in enumerate(shares) if share >= energy - 1e-6)
        torch.testing.assert_close(found[layer], best(update, rank), rtol=1e-4, atol=1e-5)
        assert torch.linalg.matrix_rank(found[layer], rtol=1e-5) == rank


def test_an_excluded_adapter_keeps_its_rank():
    paths = [save("a", 1), save("b", 2)]
    merge_checkpoints(paths, "merged", rank=3, exclude=["*value*"])
    found, own, mean = updates("merged"), updates("a"), mean_of(*paths)
    for layer in found:
        torch.testing.assert_close(
            found[layer], own[layer] if "value" in layer else best(mean[layer], 3), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"energy": 0.0}, "energy"),
        ({"rank": 2, "energy": 0.5}, "Give one of them"),
    ],
    ids=["rank", "energy", "both"],
)
def test_how_much_to_keep_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        merge_checkpoints([save("a", 1), save("b", 2)], "merged", **options)


def test_a_rank_for_whole_models_is_refused():
    base().save_pretrained("model")
    with pytest.raises(ValueError, match="rank and energy are for folders of adapters"):
        merge_checkpoints(["model", "model"], "merged", tasks=["a", "b"], rank=2)

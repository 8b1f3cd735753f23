import json
import pathlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.parameters.lora_files import LoraFiles, is_lora_file


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


FORMS = {
    "kohya": ("lora_unet_{}", ".lora_down.weight", ".lora_up.weight"),
    "diffusers": ("unet.{}", ".lora.down.weight", ".lora.up.weight"),
    "processors": ("unet.{}.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
    "text encoder": ("text_encoder.{}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "peft": ("unet.{}", ".lora_A.weight", ".lora_B.weight"),
}


def save(path, seed=0, form="kohya", alpha=None, rank=2, modules=("q", "conv"), header=None):
    torch.manual_seed(seed)
    start, first, second = FORMS[form]
    tensors = {}
    for module in modules:
        name, tail = start.format(module), (3, 3) if module == "conv" else ()
        tensors[name + first] = torch.randn(rank, 6, *tail)
        tensors[name + second] = torch.randn(8, rank, *(1 for _ in tail))
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    pathlib.Path(path).parent.mkdir(exist_ok=True)
    save_file(tensors, path, header)
    return str(path)


def updates(path, form="kohya", scale=None):
    """What a library adds to the weights, by module."""
    tensors, (_, first, second) = load_file(path), FORMS[form]
    found = {}
    for name, down in tensors.items():
        if name.endswith(first):
            module = name.removesuffix(first)
            alpha = tensors.get(f"{module}.alpha", torch.tensor(float(len(down))))
            factor = float(alpha) / len(down) if scale is None else scale
            found[module] = factor * tensors[module + second].flatten(1) @ down.flatten(1)
    return found


def best(matrix, rank):
    left, sizes, right = torch.linalg.svd(matrix.double())
    return ((left[:, :rank] * sizes[:rank]) @ right[:rank]).float()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [None, 1, 6])
def test_the_merged_file_has_the_best_update_of_the_firsts_rank(form, alpha):
    first, second = save("a.safetensors", 0, form, alpha), save("b.safetensors", 1, form, 4, rank=3)
    merge_checkpoints([first, second], "merged.safetensors", weights=[1, 3])
    own, other, found = (updates(path, form) for path in (first, second, "merged.safetensors"))
    assert found.keys() == own.keys()
    for module, update in found.items():
        torch.testing.assert_close(update, best((own[module] + 3 * other[module]) / 4, 2), rtol=1e-4, atol=1e-4)
    shapes = [
        {name: tensor.shape for name, tensor in load_file(path).items()} for path in (first, "merged.safetensors")
    ]
    assert shapes[0] == shapes[1]


def test_a_module_that_the_first_does_not_adapt_gets_rank_and_alpha_of_the_other():
    first = save("a.safetensors", 0, alpha=4, modules=["q"])
    second = save("b.safetensors", 1, alpha=9, rank=3, modules=["q", "k"])
    merge_checkpoints([first, second], "merged.safetensors")
    torch.testing.assert_close(updates("merged.safetensors")["lora_unet_k"], updates(second)["lora_unet_k"] / 2)
    merged = load_file("merged.safetensors")
    assert (float(merged["lora_unet_k.alpha"]), float(merged["lora_unet_q.alpha"])) == (9.0, 4.0)


def settings(**values):
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in values.items()})}


def test_the_scale_in_a_header_counts_and_the_merged_header_is_true():
    own = settings(r=2, lora_alpha=6, target_modules=["q"], alpha_pattern={})
    first = save("a/pytorch_lora_weights.safetensors", 0, "peft", header=own, modules=["q"])
    other = settings(r=3, lora_alpha=3, alpha_pattern={"k": 12})
    second = save("b/pytorch_lora_weights.safetensors", 1, "peft", rank=3, header=other, modules=["q", "k"])
    merged = merge_checkpoints(["a", "b"], "merged")
    found = updates("merged/pytorch_lora_weights.safetensors", "peft", scale=3)
    expected = best((updates(first, "peft", 3)["unet.q"] + updates(second, "peft", 1)["unet.q"]) / 2, 2)
    torch.testing.assert_close(found["unet.q"], expected, rtol=1e-4, atol=1e-4)
    expected = best(updates(second, "peft", 4)["unet.k"] / 2, 2)
    torch.testing.assert_close(found["unet.k"], expected, rtol=1e-4, atol=1e-4)
    with safe_open("merged/pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    assert json.loads(header["lora_adapter_metadata"]) == {
        **json.loads(own["lora_adapter_metadata"]),
        "unet.target_modules": ["k", "q"],
    }
    assert header["method"] == "average"
    assert merged.notes[0].startswith("The rank of a holds all of the merged updates but")


def test_hashes_of_the_first_file_do_not_stay():
    header = {"ss_network_dim": "2", "sshs_model_hash": "12", "modelspec.hash_sha256": "34"}
    paths = [save("a.safetensors", header=header), save("b.safetensors", 1)]
    merge_checkpoints(paths, "merged.safetensors")
    with safe_open("merged.safetensors", "pt") as file:
        assert {"ss_network_dim"} == file.metadata().keys() & header.keys()


def test_methods_that_need_a_base_take_files_as_they_are():
    merge_checkpoints([save("a.safetensors"), save("b.safetensors", 1)], "merged.safetensors", "task_arithmetic")
    assert updates("merged.safetensors").keys() == updates("a.safetensors").keys()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_unet_q.dora_scale": torch.ones(8)}, "no products of two matrices.*Fold each adapter"),
        ({"lora_unet_q.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "no products of two matrices"),
        ({"lora_unet_k.lora_down.weight": torch.ones(2, 6)}, r"but not lora_unet_k\.lora_up\.weight"),
        ({"lora_unet_q.lora_up.weight": torch.ones(8, 3)}, "are no factors of a product"),
        ({"lora_unet_q.alpha": torch.tensor(0.0)}, "the scale 0"),
    ],
    ids=["dora", "mid", "lone", "rank", "alpha"],
)
def test_what_is_no_product_is_refused(more, message):
    second = save("b.safetensors", 1)
    save_file({**load_file(second), **more}, second)
    with pytest.raises(ValueError, match=message):
        merge_checkpoints([save("a.safetensors"), second], "merged.safetensors")


def test_loha_is_refused():
    for name in ("a.safetensors", "b.safetensors"):
        save_file({f"lora_unet_q.hada_w{part}": torch.ones(2, 2) for part in ("1_a", "1_b", "2_a", "2_b")}, name)
    with pytest.raises(ValueError, match="hada_w1_a: its updates are no products"):
        merge_checkpoints(["a.safetensors", "b.safetensors"], "merged.safetensors")


def test_only_files_whose_scale_is_known_are_taken():
    assert is_lora_file(save("a.safetensors"))
    save_file({"q.lora_A.weight": torch.ones(2, 6), "q.lora_B.weight": torch.ones(8, 2)}, "plain.safetensors")
    save_file({"q.weight": torch.ones(2, 6)}, "whole.safetensors")
    pathlib.Path("broken.safetensors").write_text("x")
    assert not any(map(is_lora_file, ["plain.safetensors", "whole.safetensors", "broken.safetensors", "none.ckpt"]))


def test_factors_are_those_of_the_file_when_merged_with_itself():
    file = save("a.safetensors", alpha=4)
    adapters = LoraFiles([file])
    found, cut = adapters.factors(adapters.read(file))
    assert cut < 1e-6
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, "again.safetensors")
    for module, update in updates("again.safetensors").items():
        torch.testing.assert_close(update, updates(file)[module], rtol=1e-4, atol=1e-5)

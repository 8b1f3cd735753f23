import copy
import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import same

from lightning_odem.cli import files_in_pieces
from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.cli.state_module import StateModule
from lightning_odem.methods import (
    ClosedFormMerge,
    DOPMerge,
    IsotropicMerge,
    LinearInterpolation,
    MergeMethod,
    MergeResult,
    NUFILTMerge,
    TaskArithmeticMerge,
    TaskSingularVectorsMerge,
    TiesMerge,
    isotropic,
    opcm,
)
from lightning_odem.stream import Stream

RULES = {
    "average": "average",
    "closed_form": "closed_form",
    "closed_form-layers": ClosedFormMerge(layers=["blocks.1"]),
    "dop-adam": DOPMerge(steps=3, layers=["blocks.0", "head"]),
    "dop-sylvester": DOPMerge(solver="sylvester", alpha=None, others="average"),
    "interpolation": LinearInterpolation(0.3),
    "isotropic": IsotropicMerge(1.5),
    "isotropic-norm": "isotropic",
    "magmax": "magmax",
    "nufilt": NUFILTMerge(steps=2),
    "nufilt-layers": NUFILTMerge(steps=2, layers=["blocks.1", "head"], others="average"),
    "opcm": "opcm",
    "task_arithmetic": "task_arithmetic",
    "task_arithmetic-sum": TaskArithmeticMerge(recursion="sum"),
    "task_singular_vectors": "task_singular_vectors",
    "task_singular_vectors-recursion": TaskSingularVectorsMerge(recursion=True),
    "ties": "ties",
    "ties-sum": TiesMerge(recursion="sum", combine="mean", density=0.4),
}
DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp16": [torch.float16],
    "mixed": [torch.float32, torch.bfloat16, torch.float16],
}
WEIGHTS = [1.0, 2.0, 0.0, 1.5]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(seed, dtypes, step=0.01):
    """A model with packed attention, convolutions, batch norm, integer buffers and a counter."""
    torch.manual_seed(0)
    shapes = {
        "blocks.0.in_proj_weight": (48, 16),
        "blocks.0.in_proj_bias": (48,),
        "blocks.0.conv.weight": (12, 5, 3, 3),
        "blocks.1.fc.weight": (270, 33),
        "blocks.1.fc.bias": (270,),
        "blocks.1.scale": (),
        "head.weight": (19, 23),
        "norm.weight": (7,),
        "norm.running_mean": (7,),
        "norm.running_var": (7,),
    }
    tensors = {name: torch.rand(shape) for name, shape in shapes.items()}
    torch.manual_seed(seed)
    tensors = {
        name: (tensor + step * seed * torch.randn(tensor.shape)).abs().to(dtypes[index % len(dtypes)])
        for index, (name, tensor) in enumerate(tensors.items())
    }
    return {**tensors, "norm.num_batches_tracked": torch.tensor(seed), "ids": torch.arange(5)}


def flat(method, models, base):
    """Merge all parameters as one vector."""
    wide = {name: each.float() if each.is_floating_point() else each for name, each in models[0].items()}
    module, stream = StateModule(wide), Stream(method, base=base)
    for number, (state, weight) in enumerate(zip(models, WEIGHTS, strict=True)):
        stream.merge(module, state, str(number), weight)
    return {name: stream.state.merged[name].to(each.dtype) for name, each in models[0].items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_piece_at_a_time_is_bit_by_bit_what_one_vector_gives(rule, dtype, monkeypatch):
    monkeypatch.setattr(files_in_pieces, "_PIECE", 1)
    monkeypatch.setattr(files_in_pieces, "_SHARE", 0.0)
    models = [model(seed, DTYPES[dtype]) for seed in (1, 2, 3, 4)]
    base = model(0, DTYPES[dtype])
    for number, state in enumerate([*models, base]):
        save_file(state, f"{number}.safetensors")
    torch.save(models[1], "1.pt")
    paths = ["0.safetensors", "1.pt", "2.safetensors", "3.safetensors"]
    expected = flat(copy.deepcopy(RULES[rule]), models, base)
    merge_checkpoints(paths, "merged.safetensors", RULES[rule], "4.safetensors", WEIGHTS)
    assert same(load_file("merged.safetensors"), expected)
    assert same(torch.load("merged.ckpt", weights_only=True)["state_dict"], expected)


class Seen(MergeMethod):
    """Remembers the sizes of the vectors."""

    by_tensor = True

    def __init__(self):
        self.sizes = []

    def merge(self, merged, incoming, t, context):
        self.sizes.append(len(merged))
        return MergeResult(incoming)


def test_few_parameters_are_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(files_in_pieces, "_PIECE", 100)
    monkeypatch.setattr(files_in_pieces, "_SHARE", 0.0)
    for number in range(3):
        save_file(
            {name: torch.zeros(size) for name, size in {"a": 10, "b": 10, "c": 40, "d": 3}.items()},
            f"{number}.safetensors",
        )
    method = Seen()
    merge_checkpoints([f"{number}.safetensors" for number in range(3)], "merged.safetensors", method)
    assert method.sizes == [20, 20, 40, 40, 3, 3]


def test_doubles_beside_floats_are_merged_as_one_vector():
    states = [{"a": torch.rand(3).double() + seed, "b": torch.rand(3)} for seed in range(2)]
    for number, state in enumerate(states):
        save_file(state, f"{number}.safetensors")
    method = Seen()
    merge_checkpoints(["0.safetensors", "1.safetensors"], "merged.safetensors", method)
    assert method.sizes == [6]
    assert same(load_file("merged.safetensors"), states[1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_of_the_output_is_rounded_to_once(dtype):
    states = [{"w": torch.rand(50).bfloat16(), "n": torch.tensor([3])} for _ in range(3)]
    for number, state in enumerate(states):
        save_file(state, f"{number}.safetensors")
    merge_checkpoints([f"{number}.safetensors" for number in range(3)], "merged.safetensors", dtype=dtype)
    found = load_file("merged.safetensors")
    merge_checkpoints([f"{number}.safetensors" for number in range(3)], "wide.safetensors", dtype="float32")
    assert found["w"].dtype == getattr(torch, dtype)
    assert torch.equal(found["w"], load_file("wide.safetensors")["w"].to(found["w"].dtype))
    assert found["n"].dtype == torch.int64


def test_values_that_the_dtype_cannot_hold_are_refused():
    save_file({"w": torch.tensor([1e6])}, "a.safetensors")
    with pytest.raises(ValueError, match=r"w hold values that are too large for torch\.float16"):
        merge_checkpoints(["a.safetensors"], "merged.safetensors", dtype="float16")
    assert sorted(path.name for path in pathlib.Path().iterdir()) == ["a.safetensors"]


def folder(name, seed):
    pathlib.Path(name).mkdir()
    pathlib.Path(name, "config.json").write_text('{"dtype": "float32"}')
    save_file(model(seed, [torch.float32]), f"{name}/model.safetensors")
    return name


def test_the_weights_of_a_folder_are_divided_as_transformers_divides_them():
    paths = [folder("a", 1), folder("b", 2)]
    merge_checkpoints(paths, "whole")
    merge_checkpoints(paths, "merged", shard_size="5KB", dtype="bfloat16")
    index = json.loads(pathlib.Path("merged/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    found = {shard: load_file(f"merged/{shard}") for shard in shards}
    assert {name: shard for shard in shards for name in found[shard]} == index["weight_map"]
    whole = load_file("whole/model.safetensors")
    expected = {name: each.bfloat16() if each.is_floating_point() else each for name, each in whole.items()}
    assert same({name: each for shard in found.values() for name, each in shard.items()}, expected)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in expected.values())
    assert json.loads(pathlib.Path("merged/config.json").read_text()) == {"dtype": "bfloat16"}
    merge_checkpoints(["merged", "b"], "again")
    merge_checkpoints(paths, "merged", overwrite=True)
    assert sorted(path.name for path in pathlib.Path("merged").iterdir()) == ["config.json", "model.safetensors"]


def test_a_size_goes_with_a_folder_only():
    save_file({"w": torch.ones(1)}, "a.safetensors")
    with pytest.raises(ValueError, match="is one file"):
        merge_checkpoints(["a.safetensors"], "merged.safetensors", shard_size="5GB")
    with pytest.raises(ValueError, match="'5 bits' is no size"):
        merge_checkpoints([folder("a", 1)], "merged", shard_size="5 bits")


def test_sums_over_all_parameters_take_passes_but_no_second_decomposition(monkeypatch):
    monkeypatch.setattr(files_in_pieces, "_PIECE", 1)
    monkeypatch.setattr(files_in_pieces, "_SHARE", 0.0)
    paths = [save(f"{seed}.safetensors", seed) for seed in range(4)]
    calls = []
    for module, name in ((opcm, "project"), (isotropic, "flatten_spectrum")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, f=function, n=name: calls.append(n) or f(*given))
    merge_checkpoints(paths[1:], "a.safetensors", "opcm", paths[0])
    merge_checkpoints(paths[1:], "b.safetensors", "isotropic", paths[0])
    matrices = 4  # of which one holds three
    assert {name: calls.count(name) for name in calls} == {
        "project": 2 * matrices,
        "flatten_spectrum": 2 * (matrices + 2),
    }
    assert not [path for path in pathlib.Path().iterdir() if path.name.startswith(".")]


def save(name, seed):
    save_file(model(seed, [torch.float32]), name)
    return name


class Largest(MergeMethod):
    """Scales by a sum over all entries, and remembers how many models it saw and the sum."""

    by_tensor = "sums"

    def __init__(self):
        self.seen = []

    def merge(self, merged, incoming, t, context):
        total = float(context.summed(lambda: incoming.double().sum()))
        mean = context.kept(lambda: merged.lerp(incoming, t))
        self.seen = [*self.seen, total, float(context.summed(lambda: mean.double().sum()))]
        return MergeResult(mean / self.seen[-1])

    def state_dict(self):
        return {"seen": list(self.seen)} if self.seen else {}

    def load_state_dict(self, state):
        self.seen = list(state.get("seen", []))


def test_a_method_of_ones_own_with_sums_and_a_state_merges_in_pieces(monkeypatch):
    models = [{"a": torch.rand(3), "b": torch.rand(2, 2), "c": torch.rand(5)} for _ in range(3)]
    for number, state in enumerate(models):
        save_file(state, f"{number}.safetensors")
    paths = [f"{number}.safetensors" for number in range(3)]
    method = Largest()
    merge_checkpoints(paths, "whole.safetensors", method)
    seen = method.seen
    monkeypatch.setattr(files_in_pieces, "_PIECE", 1)
    monkeypatch.setattr(files_in_pieces, "_SHARE", 0.0)
    merge_checkpoints(paths, "merged.safetensors", method)
    assert method.seen == pytest.approx(seen)
    whole, merged = load_file("whole.safetensors"), load_file("merged.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(merged[name], tensor)

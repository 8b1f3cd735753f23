import fsdp_job
import pytest
import torch
from fsdp_job import METHODS, Net
from job import run_job
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_odem.methods import METHODS as NAMES
from lightning_odem.parameters.snapshot import cut_snapshot, gather_snapshot, take_snapshot

pytestmark = pytest.mark.slow
SIZES = (3, 2)
SHAPES = {name: tuple(tensor.shape) for name, tensor in Net().state_dict().items()}
IN_FP32 = ("ode", "ode_paper tensor")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What is saved by a process with the whole model, by three with shards of it, and by two with shards of that."""
    directory = tmp_path_factory.mktemp("shards")
    paths = [directory / f"{name}.safetensors" for name in ("one", "three", "two")]
    save_file(Net(7).state_dict(), paths[0])
    return paths


@pytest.fixture(scope="module")
def jobs(files):
    found = {}
    for size, paths in zip(SIZES, ((files[0], files[1]), (files[1], files[2])), strict=True):
        found[size] = run_job(fsdp_job.everything, size, *paths, timeout=240)
        errors = [result for result in found[size] if isinstance(result, Exception)]
        assert not errors, errors
    return found


@pytest.fixture(scope="module")
def alone():
    return {"merge": fsdp_job.merge(), "merge in fp32": fsdp_job.merge(IN_FP32, torch.float32)}


def rows_of(number, rank, size):
    """As FSDP2 cuts: equal shards, rounded up, for as long as there are rows."""
    return len(range(number)[rank * -(-number // size) :][: -(-number // size)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_shards_are_merged_as_the_whole_model_is(jobs, alone, size, name):
    found, expected = jobs[size][0]["merge"][name], alone["merge"][name]
    for tensor, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][tensor], value, rtol=0, atol=1e-13)
    assert found["path"].keys() == expected["path"].keys()
    for key, values in expected["path"].items():
        assert found["path"][key] == pytest.approx(values, rel=1e-11, abs=1e-13), key
    assert found["t"] == pytest.approx(expected["t"])
    assert found["evaluations"] == expected["evaluations"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", IN_FP32)
def test_in_single_precision_they_differ_by_rounding(jobs, alone, size, name):
    found, expected = (result["merge in fp32"][name]["weights"] for result in (jobs[size][0], alone))
    for tensor, value in expected.items():
        torch.testing.assert_close(found[tensor], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_no_process_makes_a_tensor_longer_than_its_shards(jobs, size, name):
    for rank, result in enumerate(jobs[size]):
        shapes = [shape for tensor, shape in SHAPES.items() if tensor != "mean"]
        expected = sum(rows_of(shape[0], rank, size) * torch.Size(shape[1:]).numel() for shape in shapes)
        assert result["merge"][name]["length"] == expected
        # Rules for matrices sum up their Gram matrices over the inputs.
        gram = max(torch.Size(shape[1:]).numel() for shape in shapes) ** 2 if name in ("ode", "isotropic") else 0
        # TIES counts how many entries of two vectors have each of 2^16 digits.
        counts = 2 << 16 if name == "ties" else 0
        assert result["merge"][name]["longest"] == max(expected, gram, counts)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", fsdp_job.GRANULARITIES)
def test_an_evaluation_of_the_field_takes_one_all_reduce_of_few_numbers(jobs, size, blocks):
    found = jobs[size][0]["merge"][f"ode_paper {blocks}"]
    gradients, losses = found["evaluations"]
    micro_batches = 5
    vectors, tensors = sum(len(shape) == 1 for shape in SHAPES.values()) - 1, len(SHAPES) - 1
    numbers = {"vector": 3, "coordinate": 5, "tensor": 5 + 2 * tensors, "row": 5 + 2 * vectors}[blocks]
    # With a gradient comes one of the loss; a pass without sums that of every micro-batch.
    assert sorted(found["sums"]) == sorted([1, numbers] * gradients + [micro_batches] * losses)


@pytest.mark.parametrize("size", SIZES)
def test_a_vector_of_shards_reads_writes_and_collects_as_one_of_whole_parameters(jobs, size):
    results = [result["parameters"] for result in jobs[size]]
    assert sum(found.pop("length") for found in results) == results[0]["whole length"]
    for found in results:
        found.pop("whole length")
        gradients = found.pop("gradients")
        assert all(found.values()), found
        assert gradients.keys() == {"mean", "sum", "frozen", "thawed"}
        assert all(error < 1e-14 and untouched for error, untouched in gradients.values()), gradients


@pytest.mark.parametrize("size", SIZES)
def test_a_scale_too_large_for_one_shard_is_lowered_by_all_processes_together(jobs, size):
    for result in jobs[size]:
        assert result["scale"] == {"same": True, "scale": 4.0, "passes": 3}


@pytest.mark.parametrize("size", SIZES)
def test_a_snapshot_holds_the_shards_and_what_is_not_sharded(jobs, size):
    for rank, result in enumerate(jobs[size]):
        shapes, missing = result["round trip"]
        cut = {name: (rows_of(shape[0], rank, size), *shape[1:]) for name, shape in SHAPES.items()}
        assert shapes == {**cut, "mean": SHAPES["mean"]}
        assert all(missing) if rank else not any(missing)


def test_a_snapshot_saved_by_some_processes_is_loaded_by_other_numbers_of_them(jobs, files):
    expected = Net(7).state_dict()
    for path in files:
        found = load_file(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", SIZES)
def test_what_cannot_be_merged_in_shards_is_refused_with_what_was_found(jobs, size):
    for result in jobs[size]:
        messages = result["refusals"]
        assert "6 of 11 parameters to merge are sharded and 5 are not (embed.bias, embed." in messages["partly"]
        assert messages["excluded"] is None
        for case, placements in (
            ("hybrid", "(Replicate(), Shard(dim=0))"),
            ("columns", "(Shard(dim=1),)"),
            ("copies", "(Replicate(),)"),
        ):
            assert f"has the placements {placements} on the processes" in messages[case]
            assert "tensor_parallel_size=1" in messages[case]
        assert "embed.weight: (6, 4) in the incoming model, (8, 4) in the merged model" in messages["gather"]
        assert "scale: (1,) in the module's model, (3,) in the stored model" in messages["load"]
        assert "embed.weight: (6, 4) in the module's model, (8, 4) in the stored model" in messages["cut"]


def test_whole_models_need_no_gathering_and_no_cutting():
    net = nn.Linear(3, 2)
    snapshot = take_snapshot(net)
    assert dict(gather_snapshot(net, snapshot)) == snapshot
    assert cut_snapshot(net, {**snapshot, "other": snapshot["bias"]})["weight"] is snapshot["weight"]


def test_every_rule_that_merges_shards_as_they_are_is_tried_here():
    able = {name for name, rule in NAMES.items() if getattr(rule, "sharded", False)}
    assert able == {"average", "interpolation", "isotropic", "magmax", "ode", "ode_paper", "task_arithmetic", "ties"}
    assert able == {case.split()[0] for case in METHODS}

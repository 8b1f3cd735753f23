import re
from pathlib import Path

import divided_merges
import pytest
import torch
from divided_merges import METHODS
from fsdp_job import Net
from job import run_job

from lightning_odem.methods import METHODS as NAMES
from lightning_odem.methods import FunctionMerge, resolve_method
from lightning_odem.methods.sharding import check_sharding

SIZES = (2, 3)
CASES = {
    "fp32": list(METHODS),
    "fp64": ["closed_form", "sums"],
    "single": ["closed_form", "task_singular_vectors", "sums"],
}
EVERY = [(case, name) for case, names in CASES.items() for name in names]
WHOLE_ONLY = {"average_replay", "hcmm", "ode_released", "second_moment", "trm_style"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    single = divided_merges.merge(directory, divided_merges.Single, CASES["single"])
    wide = divided_merges.merge(directory, names=CASES["fp64"], dtype=torch.float64)
    return {"fp32": divided_merges.merge(directory), "fp64": wide, "single": single}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    found = {
        size: run_job(divided_merges.everything, size, str(tmp_path_factory.mktemp("job")), timeout=240)
        for size in SIZES
    }
    errors = [result for results in found.values() for result in results if not isinstance(result, dict)]
    assert not errors, errors
    return found


def equal(name, found, expected):
    """Whether nested containers hold the same bits; sums over all parameters are added up in another order."""
    if isinstance(expected, torch.Tensor):
        same = torch.allclose(found, expected, rtol=1e-6) if name == "sums" else torch.equal(found, expected)
        return found.dtype == expected.dtype and found.shape == expected.shape and same
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(name, found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(equal, [name] * len(found), found, expected))
    return found == pytest.approx(expected) if name == "sums" else found == expected


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("case", "name"), EVERY)
def test_shards_are_merged_bit_by_bit_as_a_single_process_merges_the_whole_model(jobs, alone, size, case, name):
    for result in jobs[size][:1]:
        assert equal(name, result[case][name]["weights"], alone[case][name]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("case", "name"), EVERY)
def test_the_state_that_is_saved_is_that_of_a_single_process(jobs, alone, size, case, name):
    assert equal(name, jobs[size][0][case][name]["method"], alone[case][name]["method"])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_no_process_makes_a_tensor_of_more_than_its_share_of_the_model(jobs, size):
    sizes = [parameter.numel() for parameter in Net().parameters()]
    for result in jobs[size]:
        for name in ("dop", "sums"):  # which make no larger ones of their own
            assert result["fp32"][name]["longest"] <= 1.1 * sum(sizes) / size, name


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_an_error_in_the_owner_of_a_parameter_is_raised_in_all_processes(jobs, size):
    for result in jobs[size]:
        assert result["failure"] == ("no decomposition of embed.weight", True)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_what_cannot_be_divided_among_processes_is_refused(jobs, size):
    for result in jobs[size]:
        assert "'second_moment' needs all parameters whole" in result["refusals"]["method"]
        assert "'Told' reads a str besides the models, which cannot be divided" in result["refusals"]["need"]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_methods_that_need_all_parameters_at_once_are_refused(name):
    if name in WHOLE_ONLY:
        with pytest.raises(ValueError, match=f"'{name}' needs all parameters whole.* merge shards are .*dop, .*ties;"):
            check_sharding(resolve_method(name))
    else:
        check_sharding(resolve_method(name))


def test_the_guide_says_of_every_method_how_it_merges_shards():
    guide = Path(__file__).parents[2].joinpath("docs/guides/processes.md").read_text()
    rows = [
        set(re.findall(r"`(\w+)`", line)) & NAMES.keys() for line in re.findall(r"^\| (`.*?) \|", guide, re.MULTILINE)
    ]
    found = [set(), set(), set()]
    for name in NAMES:
        rule = resolve_method(name)
        found[0 if rule.sharded else 1 if rule.by_tensor else 2].add(name)
    assert rows == found


def test_a_function_is_taken_to_need_all_parameters_at_once():
    with pytest.raises(ValueError, match="'lerp' needs all parameters whole"):
        check_sharding(FunctionMerge(torch.lerp))

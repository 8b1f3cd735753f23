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
def test_parameters_go_to_their_owners_and_back(jobs, size):
    found = [result["exchange"] for result in jobs[size]]
    names = [name for name, _ in Net().named_parameters()]
    sizes = {name: parameter.numel() for name, parameter in Net().named_parameters()}
    for case in ("", "held"):
        assert sorted(name for result in found for name in result[case]["mine"]) == sorted(names)
        assert all(result[case]["whole"] and result[case]["back"] for result in found)
        lengths = [result[case]["length"] for result in found]
        assert sum(lengths) == sum(sizes.values())
        assert max(lengths) <= sum(lengths) / size + max(sizes.values())
    assert "embed.weight" in found[1]["held"]["mine"]
    assert "scale" in found[0]["held"]["mine"] + found[1]["held"]["mine"]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_an_error_in_the_owner_of_a_parameter_is_raised_in_all_processes(jobs, size):
    for result in jobs[size]:
        assert result["failure"] == ("no decomposition of embed.weight", True)


@pytest.mark.parametrize("name", sorted(NAMES.keys() - {"opcm"}))
def test_methods_that_need_all_parameters_at_once_are_refused(name):
    if name in WHOLE_ONLY:
        with pytest.raises(ValueError, match=f"'{name}' needs all parameters whole.* merge shards are .*dop, .*ties;"):
            check_sharding(resolve_method(name))
    else:
        check_sharding(resolve_method(name))


def test_a_function_is_taken_to_need_all_parameters_at_once():
    with pytest.raises(ValueError, match="'lerp' needs all parameters whole"):
        check_sharding(FunctionMerge(torch.lerp))

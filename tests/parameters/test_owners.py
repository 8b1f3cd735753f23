import divided_parts
import pytest
from fsdp_job import Net
from job import run_job

pytestmark = pytest.mark.slow
SIZES = {name: parameter.numel() for name, parameter in Net().named_parameters()}


@pytest.fixture(scope="module", params=[2, 3])
def results(request):
    return run_job(divided_parts.exchange, request.param)


@pytest.mark.parametrize("case", ["", "held"])
def test_each_parameter_goes_to_one_process_and_back(results, case):
    found = [result[case] for result in results]
    assert sorted(name for result in found for name in result["mine"]) == sorted(SIZES)
    assert all(result["whole"] and result["back"] for result in found)


def test_all_get_about_as_many_entries(results):
    lengths = [result[""]["length"] for result in results]
    assert sum(lengths) == sum(SIZES.values())
    assert max(lengths) <= max(1.1 * sum(lengths) / len(lengths), max(SIZES.values()))


def test_a_parameter_stays_where_something_of_it_is_held(results):
    assert "embed.weight" in results[1]["held"]["mine"]
    assert "scale" in results[0]["held"]["mine"] + results[1]["held"]["mine"]

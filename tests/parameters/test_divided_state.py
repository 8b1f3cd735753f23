import divided_parts
import pytest
import torch
from job import run_job
from torch.testing import assert_close

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 3])
def results(request):
    return run_job(divided_parts.join, request.param)


def test_the_first_process_gathers_shards_and_whatever_another_one_holds(results):
    found, size = results[0]["gathered"], len(results)
    assert all(torch.equal(found["shards"][name], tensor) for name, tensor in results[0]["whole"].items())
    assert all(torch.equal(found["loaded"][name], tensor) for name, tensor in results[0]["whole"].items())
    assert list(found["factors"][0]) == [f"matrix:{rank}" for rank in range(size)]
    for rank in range(size):
        assert_close(found["factors"][0][f"matrix:{rank}"], (torch.full((2, 1), float(rank)), torch.ones(0)))
    assert_close(found["moments"], {"a/embed.weight": torch.arange(3.0)})
    assert found["half"].dtype == torch.bfloat16
    plain = {key: found[key] for key in ("sum", "shares", "name", "count")}
    assert found["scale"] == 0.25
    assert plain == {"sum": torch.tensor(2.5), "shares": [0.5, 0.5], "name": "rule", "count": 3}


def test_the_others_get_no_tensors(results):
    for result in results[1:]:
        assert result["gathered"]["sum"] is None
        assert set(result["gathered"]["shards"].values()) == {None}
        assert result["gathered"]["shares"] == [0.5, 0.5]


def test_all_processes_know_the_keys_that_each_has(results):
    for result in results:
        assert all(f"matrix:{rank}" in keys for rank, keys in enumerate(result["keys"]))
        assert "a/embed.weight" in result["keys"][-1]
        assert "a/embed.weight" not in result["keys"][0]


def test_a_process_keeps_its_own_tensors_and_what_is_the_same_for_all(results):
    for rank, result in enumerate(results):
        factors = {f"matrix:{rank}": (torch.full((2, 1), float(rank)), torch.ones(0))}
        assert_close(result["mine"]["factors"], [factors, {}])
        del result["mine"]["factors"]
        rest = {
            "shards": {},
            "loaded": {},
            "shares": [0.5, 0.5],
            "scale": 0.25,
            "name": "rule",
            "moments": {},
            "count": 3,
        }
        assert result["mine"] == rest


def test_a_process_without_a_part_gets_the_containers_and_numbers(results):
    found = results[0]["first lacks all"]
    assert found == {
        "shards": {},
        "loaded": {},
        "factors": [{}, {}],
        "shares": [0.5, 0.5],
        "scale": 0.25,
        "name": "rule",
        "moments": {},
        "count": 3,
    }

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_odem.methods.needs import Calibration, SecondMoments, Snapshots
from lightning_odem.studies.fine_tuned_cache import FineTuned, FineTunedCache


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_comes_back_from_its_files(tmp_path):
    cache, description = FineTunedCache(tmp_path), {"lr": 1}
    tensors = {"a.weight": torch.randn(2, 3), "count": torch.tensor(3)}
    moments, head = {"a.weight": torch.rand(2, 3)}, {"head": torch.ones(2)}
    snapshots = tuple({name: tensor + number for name, tensor in tensors.items()} for number in (1, 2))
    model = FineTuned(tensors, head, {SecondMoments: moments, Snapshots: snapshots}, {"val": 0.25})
    model.fine_tuned = {"val": 0.5}
    cache.save("task", description, model)
    found = cache.load("task", {"lr": 1}, [SecondMoments(), Snapshots(2)])
    assert same(found.weights, tensors)
    assert same(found.own, model.own)
    assert same(found.collected[SecondMoments], moments)
    assert len(found.collected[Snapshots]) == 2
    assert same(found.collected[Snapshots][1], snapshots[1])
    assert (found.pretrained, found.fine_tuned) == ({"val": 0.25}, {"val": 0.5})
    assert cache.load("task", {"lr": 2}) is None
    assert cache.load("other", {"lr": 1}) is None


def test_a_model_without_its_snapshots_does_not_do_where_they_are_wanted(tmp_path):
    cache = FineTunedCache(tmp_path)
    cache.save("task", 1, FineTuned({"w": torch.ones(1)}, {}))
    assert cache.load("task", 1) is not None
    assert cache.load("task", 1, [Snapshots(2)]) is None


@pytest.mark.parametrize("number", [0, 2])
def test_a_file_of_an_earlier_version_is_read(tmp_path, number):
    cache, weights = FineTunedCache(tmp_path), {"w": torch.ones(2)}
    path = cache.path("task", 1)
    parts = {"weights/w": weights["w"], "second_moments/w": torch.full((2,), 2.0)}
    parts |= {f"snapshot{index}/w": torch.full((2,), float(index)) for index in range(number)}
    save_file(parts, path)
    facts = {"task": "task", "snapshots": number, "pretrained": {}, "fine_tuned": {"val": 0.5}, "made_by": 1}
    path.with_suffix(".json").write_text(json.dumps(facts))
    found = cache.load("task", 1, [SecondMoments(), Calibration()])
    assert same(found.weights, weights)
    assert found.collected[SecondMoments]["w"].tolist() == [2.0, 2.0]
    again = cache.load("task", 1, [Snapshots(2)])
    assert again is None if number == 0 else [float(kept["w"][0]) for kept in again.collected[Snapshots]] == [0.0, 1.0]


def test_a_write_that_was_broken_off_leaves_nothing_to_load(tmp_path):
    cache = FineTunedCache(tmp_path)
    cache.save("task", 1, FineTuned({"w": torch.ones(1)}, {}))
    facts = cache.path("task", 1).with_suffix(".json")
    assert json.loads(facts.read_text())["made_by"] == 1
    facts.unlink()
    assert cache.load("task", 1) is None

import pytest
import torch
from torch import nn

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.stream.identity import merged_names, model_fingerprint, read_model, recorded_names
from lightning_odem.stream.state import StreamState


def make_module():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def make_state(module, **known):
    merged = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
    names = merged_names(module, ("2.*",), "average")
    return StreamState(CalibrationBuffer(4), merged=merged, names=names, **known)


@pytest.mark.parametrize(("policy", "statistics"), [("average", ["1.running_mean", "1.running_var"]), ("keep", [])])
def test_merges_move_parameters_that_are_not_excluded_and_averaged_statistics(policy, statistics):
    assert merged_names(make_module(), ("2.*",), policy) == {
        "parameters": ["0.weight", "0.bias", "1.weight", "1.bias"],
        "statistics": statistics,
    }


def test_a_state_without_names_takes_all_floating_point_tensors():
    module = make_module()
    state = make_state(module)
    assert recorded_names(state) == state.names
    state.names = {}
    found = recorded_names(state)
    assert set(found["parameters"]) == {name for name, _ in module.named_parameters()}
    assert set(found["statistics"]) == {"1.running_mean", "1.running_var"}


def test_a_model_is_read_as_the_tensors_that_merges_move():
    module = make_module()
    state = make_state(module)
    read = read_model({f"model.{name}": tensor for name, tensor in module.state_dict().items()}, state, "digits")
    assert list(read) == [*state.names["parameters"], *state.names["statistics"]]
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in read.items())


def test_the_fingerprint_tells_the_model_of_a_task_from_another():
    module = make_module()
    names = merged_names(module, ("2.*",), "average")
    state = make_state(module, fingerprints={"digits": model_fingerprint(module, names)})
    nn.init.zeros_(module[2].weight)  # not merged, so no part of the fingerprint
    assert read_model(module, state, "digits")
    nn.init.zeros_(module[0].weight)
    with pytest.raises(ValueError, match="was merged with another model than the one given"):
        read_model(module, state, "digits")
    assert read_model(module, state, "letters")

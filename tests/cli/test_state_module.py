import pytest
import torch
from torch import nn

from lightning_odem.calibration.batch_norm import BatchNormStatistics
from lightning_odem.cli.state_module import StateModule
from lightning_odem.parameters.snapshot import load_snapshot, take_snapshot, undisturbed
from lightning_odem.parameters.vector import ParameterVector


def states():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ModuleDict({"a": nn.BatchNorm1d(4, affine=False)}))
    yield "modules", net.state_dict()
    yield "a bare tensor", {"weight": torch.randn(2)}
    yield "names of attributes", {"type.float.weight": torch.randn(2), "forward.bias": torch.randn(1)}
    yield "a tensor beside a module of its name", {"a": torch.randn(2), "a.b.c": torch.randn(3)}
    yield "dtypes", {str(i): torch.ones(2, dtype=d) for i, d in enumerate((torch.half, torch.double, torch.bool))}


@pytest.mark.parametrize("state", [pytest.param(state, id=name) for name, state in states()])
def test_names_values_and_dtypes_come_back(state):
    found = StateModule(state).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)


def test_floating_tensors_are_trainable_and_others_buffers():
    module = StateModule({"a.weight": torch.ones(2), "a.index": torch.arange(3)})
    assert [name for name, tensor in module.named_parameters() if tensor.requires_grad] == ["a.weight"]
    assert [name for name, _ in module.named_buffers()] == ["a.index"]


def test_parameters_keep_the_order_of_the_module():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert ParameterVector(StateModule(net.state_dict())).names == ParameterVector(net).names


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.BatchNorm3d(4, affine=False), nn.SyncBatchNorm(4)])
def test_running_statistics_are_those_of_a_batch_norm_layer(layer):
    module = StateModule({"norm." + name: value for name, value in layer.state_dict().items()} | {"w": torch.ones(1)})
    statistics = BatchNormStatistics(module, (), "average")
    assert [len(value) for value in statistics.read()] == [4, 4]
    assert not any("running" in name for name, _ in module.named_parameters())


def test_statistics_without_a_counter_get_none():
    state = {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
    module = StateModule({f"norm.{name}": value for name, value in state.items()})
    assert list(module.state_dict()) == ["norm.running_mean", "norm.running_var"]


def test_a_running_mean_alone_is_a_parameter():
    assert [name for name, _ in StateModule({"a.running_mean": torch.ones(2)}).named_parameters()] == ["a.running_mean"]


def test_the_tensors_given_are_never_written_to():
    state = {"weight": torch.ones(2), "index": torch.arange(2)}
    module = StateModule(state)
    with torch.no_grad():
        module.weight.zero_()
        module.index.zero_()
    assert state["weight"].tolist() == [1, 1]
    assert state["index"].tolist() == [0, 1]


def test_what_a_merge_does_with_a_module_works():
    module = StateModule(dict(states())["modules"])
    before = take_snapshot(module)
    with undisturbed(module):
        assert not any(child.training for child in module.modules())
    load_snapshot(module, before, lambda name: True)
    module.load_state_dict(module.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in take_snapshot(module).items())


@pytest.mark.parametrize("name", ["", "a..b", ".a", "a."])
def test_a_name_with_an_empty_part_is_refused(name):
    with pytest.raises(ValueError, match="a part between its dots is empty"):
        StateModule({name: torch.ones(1)})

import pytest
import torch
from torch import nn

from lightning_odem.parameters.division import Division


class Net(nn.Module):
    task_specific = ("heads",)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.adapter = nn.Linear(2, 2)
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 2)})


def names(net, select):
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {name.replace("_orig_mod.", "") for name in tensors if select(name)}


@pytest.mark.parametrize("compiled", [False, True])
def test_every_trainable_tensor_is_shared_or_of_a_task(compiled):
    net = Net()
    if compiled:
        net.body = torch.compile(net.body, backend="eager")
        net.heads["a"] = torch.compile(net.heads["a"], backend="eager")
    division = Division(["adapter"])
    own = names(net, division.task_specific(net))
    assert own == {"adapter.weight", "adapter.bias", "heads.a.weight", "heads.a.bias"}
    assert names(net, division.shared(net)) == names(net, lambda name: True) - own


def test_frozen_excluded_parameters_belong_to_no_task():
    net = Net()
    net.adapter.weight.requires_grad_(False)
    division = Division(["adapter"])
    assert "adapter.weight" not in names(net, division.task_specific(net)) | names(net, division.shared(net))


def test_buffers_of_excluded_layers_belong_to_the_task():
    net = Net()
    own = names(net, Division(["body.1"]).task_specific(net))
    assert {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"} <= own


def test_patterns_of_the_module_are_added_to_the_users():
    assert Division(["*.bias"]).patterns(Net()) == ("*.bias", "heads")
    assert Division(["*.bias"]).patterns(nn.Linear(1, 1)) == ("*.bias",)


def test_check_lists_idle_patterns_and_the_names_there_are():
    Division(["adapter", "*.bias"]).check(Net())
    with pytest.raises(ValueError, match=r"exclude=\['haeds'\] matches no parameter of Net; .*heads\.a\.weight"):
        Division(["adapter", "haeds"]).check(Net())


def test_patterns_of_the_module_may_be_idle():
    net = Net()
    del net.heads
    Division([]).check(net)


def test_a_string_is_no_tuple_of_patterns():
    net = Net()
    net.task_specific = "heads"
    with pytest.raises(ValueError, match=r"Net.task_specific is a tuple of patterns.*write \('heads',\)"):
        Division([]).patterns(net)

import random

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_odem.parameters.snapshot import load_snapshot, take_snapshot, undisturbed


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm1d(4).eval()
        self.head = nn.Linear(4, 2)
        self.accuracy = MulticlassAccuracy(num_classes=2, average="micro")
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1  # another tensor under the same name
        return self.head(self.frozen(self.body(x)))


def run(net):
    """What a block may do to a module: train-mode forward, backward, metrics, random numbers."""
    net.train()
    scores = net(torch.randn(8, 3))
    scores.sum().backward()
    net.accuracy(scores, torch.randint(2, (8,)))
    np.random.rand()  # noqa: NPY002
    random.random()
    return scores


def random_numbers():
    return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002


def seed():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)


def test_snapshot_copies_parameters_and_buffers_in_their_dtypes():
    net = Net().to(torch.bfloat16)
    snapshot = take_snapshot(net)
    state = net.state_dict()
    assert snapshot.keys() == state.keys()
    assert all(torch.equal(snapshot[name], state[name]) for name in state)
    assert snapshot["body.0.weight"].dtype == torch.bfloat16
    assert snapshot["body.1.num_batches_tracked"].dtype == torch.int64
    assert not any(tensor.requires_grad for tensor in snapshot.values())
    nn.init.zeros_(net.head.weight)
    assert snapshot["head.weight"].any()


def test_snapshot_holds_tied_weights_once_under_uncompiled_names():
    net = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"))
    net[0].weight = net[1].weight
    assert sorted(take_snapshot(net)) == ["0.bias", "0.weight", "1.bias"]


def test_load_restores_the_selected_tensors_in_place():
    net = Net()
    snapshot = take_snapshot(net, lambda name: name.startswith("head"))
    weight, storage = net.head.weight, net.head.weight.data_ptr()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    body = net.body[0].weight.clone()
    load_snapshot(net, snapshot, lambda name: name.startswith("head"))
    assert torch.equal(net.head.weight, snapshot["head.weight"])
    assert torch.equal(net.body[0].weight, body)
    assert net.head.weight is weight
    assert weight.data_ptr() == storage


@pytest.mark.parametrize("change", [{"head.bias": torch.zeros(3)}, {"extra": torch.zeros(1)}])
def test_load_of_another_architecture_writes_nothing(change):
    net = Net()
    wrong = {name: tensor + 1 for name, tensor in take_snapshot(net).items()} | change
    before = take_snapshot(net)
    with pytest.raises(ValueError, match=f"{next(iter(change))}: "):
        load_snapshot(net, wrong, lambda name: True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in take_snapshot(net).items())


def test_a_module_on_the_meta_device_is_not_taken_for_loaded():
    snapshot = take_snapshot(Net())
    with torch.device("meta"):
        net = Net()
    with pytest.raises(
        ValueError, match=r"body.0.weight, .*, \.\.\. of Net cannot be written: .*meta device.*on_fit_start"
    ):
        load_snapshot(net, snapshot, lambda name: True)
    load_snapshot(net.to_empty(device="cpu"), snapshot, lambda name: True)
    assert torch.equal(net.head.weight, snapshot["head.weight"])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fails", [False, True])
def test_a_block_leaves_nothing_behind(mode, fails):
    net = Net()
    net(torch.randn(8, 3)).sum().backward()
    net.head.bias.grad = None
    net.body[0].weight.requires_grad_(False)
    flags = [module.training for module in net.modules()]
    grads = [parameter.grad for parameter in net.parameters()]
    grad_values = [None if grad is None else grad.clone() for grad in grads]
    tensors, identities = take_snapshot(net), dict(net.named_buffers())
    seed()
    expected = random_numbers()
    seed()
    error = None
    try:
        with mode(), undisturbed(net):
            assert not any(module.training for module in net.modules())
            assert all(parameter.grad is None for parameter in net.parameters())
            assert run(net).requires_grad
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt as caught:
        error = caught
    assert (error is not None) is fails
    assert [module.training for module in net.modules()] == flags
    assert not net.frozen.training
    assert all(parameter.grad is grad for parameter, grad in zip(net.parameters(), grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, grad_values, strict=True) if a is not None)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in take_snapshot(net).items())
    assert all(buffer is identities[name] for name, buffer in net.named_buffers())
    assert net.accuracy.update_count == 0
    assert random_numbers() == expected


def test_parameters_written_in_a_block_stay():
    net = Net()
    with undisturbed(net):
        load_snapshot(net, {"head.bias": torch.tensor([3.0, 4.0])}, lambda name: name == "head.bias")
    assert net.head.bias.tolist() == [3.0, 4.0]


def test_a_metric_the_block_does_not_touch_keeps_its_state():
    net = Net()
    net.accuracy(torch.tensor([0, 1]), torch.tensor([0, 0]))
    with undisturbed(net):
        net(torch.randn(8, 3))
    assert (net.accuracy.update_count, net.accuracy.compute().item()) == (1, 0.5)


def test_a_module_can_be_trained_on_after_inference_mode():
    net = Net()
    with torch.inference_mode(), undisturbed(net):
        run(net)
    run(net)
    assert net.head.weight.grad is not None
    assert net.accuracy.update_count == 1
    assert not any(buffer.is_inference() for buffer in net.buffers())

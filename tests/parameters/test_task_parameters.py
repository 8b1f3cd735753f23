import pytest
import torch
from torch import nn

from lightning_odem.parameters.task_parameters import as_task, explaining_shapes, put_task_parameters


class Net(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, classes)
        self.head.register_buffer("seen", torch.zeros(classes))

    def forward(self, x):
        return self.head(self.body(x))


def kept(classes, value=1.0):
    return {
        "head.weight": torch.full((classes, 4), value),
        "head.bias": torch.full((classes,), value),
        "head.seen": torch.full((classes,), value),
    }


def test_a_module_is_that_of_a_task_within_the_block_and_the_same_as_before_after_it():
    net = Net()
    before = dict([*net.named_parameters(), *net.named_buffers()])
    values = {name: tensor.detach().clone() for name, tensor in before.items()}
    with as_task(net, kept(2)):
        assert net.head.bias.tolist() == [1.0, 1.0]
        assert net.head.seen.tolist() == [1.0, 1.0]
        assert net.body.weight is before["body.weight"]
    after = dict([*net.named_parameters(), *net.named_buffers()])
    assert all(after[name] is tensor and torch.equal(tensor, values[name]) for name, tensor in before.items())


def test_a_head_of_another_size_takes_the_place_of_the_modules():
    net = Net(classes=2)
    with as_task(net, kept(5)):
        assert net(torch.zeros(1, 3)).shape == (1, 5)
    assert net(torch.zeros(1, 3)).shape == (1, 2)


def test_a_module_is_as_before_also_after_an_error():
    net = Net()
    head = net.head.weight
    with pytest.raises(RuntimeError, match="stop"), as_task(net, kept(5)):
        raise RuntimeError("stop")
    assert net.head.weight is head


def test_only_the_modules_other_parameters_get_a_gradient():
    net = Net()
    own = kept(2)
    with as_task(net, own):
        net(torch.ones(1, 3)).sum().backward()
        assert net.head.weight.grad is None
    assert net.body.weight.grad is not None
    assert net.head.weight.grad is None
    assert torch.equal(own["head.weight"], torch.ones(2, 4))


def test_a_tied_tensor_is_replaced_wherever_it_is():
    net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
    net[1].weight = net[0].weight
    tied = net[0].weight
    with as_task(net, {"0.weight": torch.ones(3, 2)}):
        assert net[0].weight is net[1].weight
        assert net[0].weight.sum() == 6
    assert net[0].weight is net[1].weight is tied


def test_parameters_are_given_for_good_in_place_where_shapes_agree():
    net = Net(classes=2)
    weight, own = net.head.weight, kept(2)
    put_task_parameters(net, own)
    assert net.head.weight is weight
    assert weight.requires_grad
    assert weight.sum() == 8


def test_parameters_of_another_size_are_copies_that_can_be_trained():
    net, own = Net(classes=2), kept(5)
    put_task_parameters(net, own)
    net(torch.ones(1, 3)).sum().backward()
    assert net.head.weight.grad.shape == (5, 4)
    with torch.no_grad():
        net.head.weight.zero_()
    assert own["head.weight"].sum() == 20


def test_an_error_with_parameters_of_another_size_names_them_and_what_to_do():
    net = Net()
    with (
        pytest.raises(ValueError, match=r"Net cannot run as task 'a', which keeps head.weight \[3, 4\]"),
        explaining_shapes(net, "a", kept(3)),
        as_task(net, kept(3)),
    ):
        net(torch.ones(1, 3)).view(1, 2)
    with pytest.raises(RuntimeError, match="invalid for input"), explaining_shapes(net, "a", kept(2)):
        net(torch.ones(1, 3)).view(1, 3)

import pytest
import torch
from torch import nn

from lightning_odem.parameters.gradients import GradientSum
from lightning_odem.parameters.vector import ParameterVector


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batches(n):
    return torch.randn(n, 5, 3, generator=torch.Generator().manual_seed(1))


def added_by_hand(module, losses):
    """The sum of the gradients, each taken by ``torch.autograd.grad`` and added in order."""
    total = [torch.zeros_like(parameter) for parameter in module.parameters()]
    for loss in losses(module):
        for piece, grad in zip(total, torch.autograd.grad(loss, list(module.parameters())), strict=True):
            piece.add_(grad)
    return torch.cat([piece.flatten() for piece in total])


def collected(module, losses):
    with ParameterVector(module).collect_gradient() as gradient:
        for loss in losses(module):
            loss.backward()
    return gradient


def squares(net):
    return (net(batch).square().mean() for batch in batches(5))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_sum_has_the_bits_of_gradients_added_one_by_one(compiled):
    net = make_net()
    if compiled:
        net[2] = torch.compile(net[2], backend="aot_eager")
    assert torch.equal(collected(net, squares), added_by_hand(make_net(), squares))


def test_gradients_of_channels_last_weights_are_added_in_the_order_of_the_vector():
    net = nn.Conv2d(3, 4, 3)
    images = torch.randn(2, 3, 8, 8)

    def losses(net):
        return (net(image[None]).square().mean() for image in images)

    expected = added_by_hand(net, losses)
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(collected(net, losses), expected, rtol=1e-5, atol=1e-6)


def test_sparse_gradients_are_added():
    dense, sparse = (nn.Embedding(7, 2, sparse=is_sparse) for is_sparse in (False, True))
    sparse.load_state_dict(dense.state_dict())

    def losses(embedding):
        return (embedding(torch.tensor(rows)).square().sum() for rows in ([1, 1, 3], [3, 6]))

    assert torch.equal(collected(sparse, losses), added_by_hand(dense, losses))


def test_no_parameter_has_a_gradient_of_its_own_while_gradients_are_collected():
    net = make_net().append(nn.Linear(2, 2).to(torch.bfloat16))
    vector = ParameterVector(net, exclude=["2"])
    with vector.collect_gradient() as gradient:
        net[3](net[:3](batches(1)[0]).to(torch.bfloat16)).square().mean().backward()
        memory = gradient.untyped_storage().data_ptr()
        assert all(parameter.grad.untyped_storage().data_ptr() == memory for parameter in net[0].parameters())
        assert all(parameter.grad is None for part in net[2:] for parameter in part.parameters())
    assert all(piece.abs().max() > 0 for piece in vector.views(gradient))


def test_gradients_in_a_pause_do_not_count():
    net = make_net().append(nn.Linear(2, 2).to(torch.float64))
    parts = list(net.parameters())
    pieces = [torch.zeros(parameter.shape) for parameter in parts]
    gradients = GradientSum(parts, pieces)
    with gradients.paused():
        net[3](net[:3](batches(1)[0]).double()).sum().backward()
        assert all(parameter.grad is not None for parameter in parts)
        net.zero_grad(set_to_none=False)
    assert not gradients.is_reached
    net[0](batches(1)[0]).sum().backward()
    assert gradients.is_reached
    gradients.close()
    assert [bool(piece.any()) for piece in pieces] == [True, True, False, False, False, False]

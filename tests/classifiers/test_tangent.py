import copy

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_odem.classifiers.tangent import Linearized

FP64 = torch.float64


def make_net(dtype=FP64):
    """One hidden layer, with batch norm in some state of training and dropout."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)).to(dtype)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def moved(net, seed=1, scale=0.3):
    """The linearised network with theta somewhere else than theta_0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return net


def inputs_of(net, count=4):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(2), dtype=FP64).to(next(net.parameters()))


def expansion(backbone, theta, inputs):
    """f(x; theta_0) + J (theta - theta_0), with the Jacobian of every sample written out."""
    backbone = copy.deepcopy(backbone).eval()
    origin = {name: parameter.detach() for name, parameter in backbone.named_parameters()}

    def output(parameters, sample):
        return functional_call(backbone, parameters, (sample[None],))[0]

    jacobian = vmap(jacrev(output), (None, 0))(origin, inputs)
    result = backbone(inputs).detach()
    for name, matrix in jacobian.items():
        result = result + matrix.flatten(2) @ (theta[name] - origin[name]).flatten()
    return result


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def load(module, tensors):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])


def test_a_linear_model_equals_itself_at_any_weights():
    net = moved(Linearized(nn.Linear(3, 2).double()))
    inputs = inputs_of(net)
    torch.testing.assert_close(net(inputs), net.model(inputs))


def test_the_expansion_is_that_by_the_explicit_jacobian():
    backbone = make_net()
    origin = copy.deepcopy(backbone)
    net = moved(Linearized(backbone))
    inputs = inputs_of(net)
    torch.testing.assert_close(net(inputs), expansion(origin, weights(net.model), inputs))
    assert (net(inputs) - net.model(inputs)).abs().max() > 0.05  # the network itself is not linear


def test_gradients_are_those_of_the_explicit_formula():
    backbone = make_net()
    origin = copy.deepcopy(backbone)
    net = moved(Linearized(backbone))
    inputs = inputs_of(net)
    net(inputs).exp().sum().backward()
    theta = {name: value.requires_grad_() for name, value in weights(net.model).items()}
    expansion(origin, theta, inputs).exp().sum().backward()
    for name, parameter in net.model.named_parameters():
        torch.testing.assert_close(parameter.grad, theta[name].grad)


def test_at_the_expansion_point_the_output_is_the_backbone_s_bit_by_bit():
    backbone = make_net(torch.float32)
    expected = copy.deepcopy(backbone).eval()
    inputs = inputs_of(backbone)
    assert torch.equal(Linearized(backbone)(inputs), expected(inputs))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.5])
def test_features_of_averaged_weights_are_averaged_features(share):
    net = moved(Linearized(make_net()), seed=3)
    inputs = inputs_of(net)
    first, first_output = weights(net.model), net(inputs)
    moved(net, seed=4)
    second, second_output = weights(net.model), net(inputs)
    load(net.model, {name: torch.lerp(first[name], second[name], share) for name in first})
    torch.testing.assert_close(net(inputs), torch.lerp(first_output, second_output, share))


def test_fine_tuning_leaves_the_expansion_point_and_moves_theta():
    net = Linearized(make_net())
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(inputs_of(net)).square().sum().backward()
        optimizer.step()
    theta = {f"model.{name}" for name, _ in net.model.named_parameters()}
    assert {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])} == theta
    assert {name for name, parameter in net.named_parameters() if parameter.requires_grad} == theta


def test_training_mode_does_not_reach_the_network():
    net = moved(Linearized(make_net())).train()
    assert net.training
    assert not any(module.training for module in (*net.model.modules(), *net.origin.modules()))
    inputs = inputs_of(net)
    assert torch.equal(net(inputs), net(inputs))


def test_a_state_dict_brings_the_expansion_point_along():
    net, other = moved(Linearized(make_net())), Linearized(make_net())
    moved(other, seed=9).recenter_()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(inputs_of(net)), net(inputs_of(net)))


def test_recentring_moves_the_expansion_point_to_where_the_weights_and_statistics_are():
    net = moved(Linearized(make_net()))
    net.model[1].running_mean.add_(1)
    inputs = inputs_of(net)
    before = net(inputs)
    net.recenter_()
    assert torch.equal(net(inputs), net.model(inputs))
    assert not torch.allclose(net(inputs), before)


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, inputs):
            return self.second(self.first(inputs))

    net = Linearized(Tied().double())
    origin = net.origin.first.weight.clone()
    moved(net)
    change, inputs = net.model.first.weight - origin, inputs_of(net)
    expected = inputs @ (origin @ origin + change @ origin + origin @ change).T
    torch.testing.assert_close(net(inputs), expected)
    assert [name for name, _ in net.model.named_parameters()] == ["first.weight"]


def test_frozen_parameters_that_have_moved_count_as_well():
    net = moved(Linearized(make_net()))
    inputs = inputs_of(net)
    before = net(inputs)
    net.model[0].requires_grad_(False)
    torch.testing.assert_close(net(inputs), before)
    net(inputs).sum().backward()
    assert net.model[0].weight.grad is None
    assert net.model[4].weight.grad is not None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_needed(context):
    net = moved(Linearized(make_net()))
    expected = net(inputs_of(net)).detach()
    with context():
        assert torch.equal(net(inputs_of(net)), expected)


def test_autocast_does_not_reduce_the_precision():
    net = moved(Linearized(make_net(torch.float32)))
    inputs = inputs_of(net).bfloat16().float()
    expected = net(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(inputs), expected)
        assert torch.equal(net(inputs.bfloat16()), expected)


def test_attributes_that_describe_the_features_are_passed_on():
    timm_model = timm.create_model("mobilenetv3_small_050", num_classes=0)
    net = Linearized(timm_model)
    names = ("num_features", "head_hidden_size", "pretrained_cfg")
    assert [getattr(net, name) for name in names] == [getattr(timm_model, name) for name in names]
    assert not hasattr(Linearized(nn.Flatten()), "num_features")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_timm_models_are_linearised(name):
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, **({"img_size": 32} if name == "test_vit" else {}))
    net = moved(Linearized(backbone).double(), scale=0.02)  # away from rectifiers that start at exactly 0
    net.recenter_()
    inputs = torch.rand(2, 3, 32, 32, dtype=FP64)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(net(inputs), backbone.eval()(inputs))
    # The network's own slope along a line of weights, by central differences.
    origin, step = weights(net.model), 1e-6
    moved(net, seed=2, scale=0.02)
    theta, linear = weights(net.model), net(inputs)
    outputs = []
    for sign in (0, -1, 1):
        load(net.model, {key: value + sign * step * (theta[key] - value) for key, value in origin.items()})
        outputs.append(net.model(inputs).detach())
    value, below, above = outputs
    torch.testing.assert_close(linear.detach(), value + (above - below) / (2 * step), rtol=1e-5, atol=1e-5)
    linear.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.model.parameters())
    assert any(parameter.grad.any() for parameter in net.model.parameters())

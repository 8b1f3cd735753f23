import pytest
import torch
from torch import nn
from torch.nn.functional import relu, unfold

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.calibration.input_moments import input_moments
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.parameters.linear_layers import linear_layers


def measure(net, inputs, size=4, run=None):
    """The moments found on samples in micro-batches."""
    buffer = CalibrationBuffer(100)
    buffer.add("task", (inputs,))
    layers = linear_layers(net, {tensor: name for name, tensor in net.named_parameters()})
    return input_moments(layers, buffer.micro_batches_of("task", size), run or (lambda batch: net(batch.samples[0])))


def second_moments(rows):
    return (rows.mT @ rows / rows.shape[-2]).detach()


def test_those_of_linear_layers_are_the_means_over_the_samples():
    net, inputs = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(10, 5)
    found = measure(net, inputs)
    hidden = relu(inputs @ net[0].weight.T + net[0].bias)
    assert {name: tuple(moments.shape) for name, moments in found.items()} == {
        "0.weight": (1, 5, 5),
        "2.weight": (1, 4, 4),
    }
    torch.testing.assert_close(found["0.weight"][0], second_moments(inputs))
    torch.testing.assert_close(found["2.weight"][0], second_moments(hidden))
    assert not any(moments.requires_grad for moments in found.values())


def test_those_of_convolutions_are_the_patches_of_each_group():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, groups=2))
    inputs = torch.randn(7, 3, 8, 8)
    found = measure(net, inputs)
    hidden = relu(net[0](inputs))
    patches = unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found["0.weight"], second_moments(patches)[None])
    for group in range(2):
        patches = unfold(hidden[:, 2 * group : 2 * group + 2], 3, stride=2).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(found["2.weight"][group], second_moments(patches))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_size_of_micro_batches_does_not_matter(size):
    net, inputs = nn.Conv1d(2, 4, 3), torch.randn(10, 2, 9)
    torch.testing.assert_close(measure(net, inputs, size), measure(net, inputs, 10))


def test_a_padded_token_counts_like_any_other():
    net, inputs = nn.Linear(3, 2), torch.randn(4, 5, 3)
    inputs[:, 3:] = 1.0
    torch.testing.assert_close(measure(net, inputs)["weight"][0], second_moments(inputs.flatten(0, 1)))


def test_sums_are_exact_where_the_pass_is_not():
    net, inputs = nn.Linear(3, 2), torch.randn(64, 3)

    def run(batch):
        with torch.autocast("cpu", torch.bfloat16):
            net(batch.samples[0])

    torch.testing.assert_close(measure(net, inputs, run=run)["weight"][0], second_moments(inputs))
    low = measure(net.bfloat16(), inputs.bfloat16())["weight"]
    torch.testing.assert_close(low[0], second_moments(inputs.bfloat16().float()))


def test_double_precision_stays():
    net, inputs = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(measure(net, inputs)["weight"][0], second_moments(inputs))


def test_a_layer_that_is_called_twice_counts_twice():
    net, inputs = nn.Linear(3, 3), torch.randn(5, 3)
    found = measure(net, inputs, run=lambda batch: net(input=net(batch.samples[0])))
    torch.testing.assert_close(found["weight"][0], second_moments(torch.cat([inputs, net(inputs)])))


def test_layers_that_are_not_called_have_none():
    net = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    net.spare = nn.Linear(4, 4)
    assert measure(net, torch.randn(3, 5, 4)).keys() == {"linear1.weight", "linear2.weight"}


def test_compiled_layers_are_seen(tmp_path):
    net, inputs = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    expected = measure(net, inputs)
    net[0].compile(backend="eager")
    net[1] = torch.compile(net[1], backend="eager")
    net(inputs)
    found = measure(net, inputs)
    torch.testing.assert_close(list(found.values()), list(expected.values()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_an_error(value):
    inputs = torch.randn(5, 3)
    inputs[2, 1] = value
    with pytest.raises(NonFiniteLossError, match="the inputs of weight are not finite"):
        measure(nn.Linear(3, 2), inputs)


def test_nothing_stays_at_the_layers_whatever_happens():
    net = nn.Linear(3, 2)

    def fail(batch):
        raise RuntimeError("in the pass")

    with pytest.raises(RuntimeError, match="in the pass"):
        measure(net, torch.randn(5, 3), run=fail)
    assert not net._forward_pre_hooks

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_odem.parameters import linear_layers as module_under_test
from lightning_odem.parameters.linear_layers import inputs_first, linear_layers, multiplied, number_of_groups


def found(module):
    return linear_layers(module, {tensor: name for name, tensor in module.named_parameters()})


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), (4, 9)),
    "grouped": (nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
    "depth-wise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 7, 6)),
    "strided": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 8, 6)),
    "dilated": (nn.Conv2d(2, 4, 3, dilation=(2, 1), groups=2), (2, 9, 5)),
    "same": (nn.Conv2d(2, 4, (2, 3), padding="same"), (2, 5, 5)),
    "circular": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "3d": (nn.Conv3d(2, 4, (2, 1, 3), stride=(1, 2, 1), padding=(0, 0, 1), groups=2), (2, 3, 4, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("samples", [(), (3,)])
def test_a_convolution_is_its_groups_matrices_times_the_patches(layer, shape, samples):
    inputs = torch.randn(*samples, *shape)
    expected = layer(inputs)
    rows = torch.cat(list(multiplied(layer, inputs)), 1)
    weight = layer.weight.unflatten(0, (layer.groups, -1)).flatten(2)  # [groups, out, in]
    outputs = (rows @ weight.mT).movedim(0, 1).flatten(1) + layer.bias
    batched = expected if samples else expected[None]
    torch.testing.assert_close(outputs, batched.movedim(1, -1).flatten(0, -2), rtol=1e-5, atol=1e-6)


def test_patches_of_many_samples_come_in_pieces(monkeypatch):
    layer, inputs = nn.Conv2d(2, 4, 3, groups=2), torch.randn(5, 2, 4, 4)
    [whole] = multiplied(layer, inputs)
    monkeypatch.setattr(module_under_test, "_PIECE", 2 * 2 * 4 * 9)  # entries of two samples
    pieces = list(multiplied(layer, inputs))
    assert [piece.shape[1] for piece in pieces] == [8, 8, 4]
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_a_linear_layer_multiplies_every_token():
    inputs = torch.randn(2, 3, 4)
    [rows] = multiplied(nn.Linear(4, 5), inputs)
    assert torch.equal(rows, inputs.reshape(1, 6, 4))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_multiplies_the_channels_of_every_place(groups):
    layer, inputs = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups, bias=False), torch.randn(3, 4, 2, 2)
    [rows] = multiplied(layer, inputs)
    weight = layer.weight.unflatten(0, (groups, -1)).flatten(2)  # [groups, in, out]
    blocks = (rows @ weight).unflatten(1, (3, 2, 2)).unflatten(-1, (-1, 2, 2))  # [groups, n, h, w, out, kh, kw]
    outputs = blocks.permute(1, 0, 4, 2, 5, 3, 6).reshape(3, 6, 4, 4)
    torch.testing.assert_close(outputs, layer(inputs))


def test_transformers_conv1d_multiplies_every_token_by_the_transpose():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer, inputs = pytorch_utils.Conv1D(5, 4), torch.randn(2, 3, 4)
    assert list(found(layer).values()) == ["weight"]
    assert inputs_first(found(layer)) == {"weight"}
    [rows] = multiplied(layer, inputs)
    torch.testing.assert_close(rows[0] @ layer.weight + layer.bias, layer(inputs).flatten(0, 1))


def test_groups_and_orientation_are_told_by_name():
    layers = [nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(4, 8, 3), nn.ConvTranspose1d(4, 8, 3, groups=4), nn.Linear(4, 2)]
    names = found(nn.Sequential(*layers))
    assert list(names.values()) == [f"{index}.weight" for index in range(4)]
    assert number_of_groups(names) == {"0.weight": 2, "2.weight": 4}
    assert inputs_first(names) == {"2.weight"}


def test_computed_weights_and_other_layers_are_left_out():
    layers = [nn.LayerNorm(3), nn.Embedding(4, 3), nn.Flatten(), parametrizations.weight_norm(nn.Linear(3, 2))]
    net = nn.Sequential(*layers, nn.Linear(2, 2))
    net[4].weight.requires_grad_(False)
    merged = {tensor: name for name, tensor in net.named_parameters() if tensor.requires_grad}
    assert linear_layers(net, merged) == {}


def test_layers_that_share_a_weight_are_both_there():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert found(net) == {net[0]: "0.weight", net[1]: "0.weight"}

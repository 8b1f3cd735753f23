import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_odem.classifiers.classifier import TaskClassifier
from lightning_odem.parameters.weights_file import load_weights

CifarResNet = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "cifar_resnet.py"))["CifarResNet"]


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_072), (56, 852_368)])
def test_size_is_that_of_the_published_network_without_its_classifier(depth, parameters):
    assert sum(parameter.numel() for parameter in CifarResNet(depth).parameters()) == parameters


@pytest.mark.parametrize("size", [28, 32, 33])
def test_features_are_64_per_image_for_any_size(size):
    net = CifarResNet(8)
    assert net(torch.rand(2, 3, size, size)).shape == (2, net.num_features)


def test_a_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros():
    net = CifarResNet(8).eval()
    block = net.layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 6, 6)
    out = block(x)
    torch.testing.assert_close(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_a_depth_without_such_a_network_is_refused():
    with pytest.raises(ValueError, match="depth is 18"):
        CifarResNet(18)


def test_classifier_takes_the_normalisation_from_the_network():
    model = TaskClassifier(CifarResNet(8))
    assert model.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model.normalize.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


@pytest.fixture
def folder():
    if "LIGHTNING_ODEM_DATA" not in os.environ:
        pytest.skip("LIGHTNING_ODEM_DATA does not name the folder with the CIFAR-10 weights")
    return Path(os.environ["LIGHTNING_ODEM_DATA"])


@pytest.mark.parametrize("depth", [20, 56])
def test_published_weights_load_with_only_the_classifier_left_out(folder, depth):
    net = CifarResNet(depth)
    assert load_weights(net, folder / f"resnet{depth}_cifar10.safetensors") == ["linear.bias", "linear.weight"]


@pytest.mark.parametrize("depth", [20, 56])
def test_activations_on_photographs_agree_with_the_published_running_means(folder, depth):
    """An independent check of layout and normalisation: another shortcut or other inputs push this below 0.83."""
    model = TaskClassifier(CifarResNet(depth), checkpoint=folder / f"resnet{depth}_cifar10.safetensors").eval()
    correlations = []

    def compare(layer, inputs):
        means = torch.stack([inputs[0].mean(dim=(0, 2, 3)), layer.running_mean])
        correlations.append(torch.corrcoef(means)[0, 1].item())

    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(compare)
    with np.load(folder / "flowers5.npz") as archive, torch.no_grad():
        model.features(torch.from_numpy(archive["val_images"]).permute(0, 3, 1, 2))
    assert len(correlations) == depth - 1
    assert np.mean(correlations) > 0.88

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_odem.classifiers.probe import ABSENT_BIAS, extract_features, fit_linear_probe


def blobs(classes, per_class=30, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = torch.randn(classes, size, generator=generator) * 1.5
    noise = torch.randn(len(labels), size, generator=generator)
    scales = torch.tensor([0.01, 1.0, 3.0, 50.0, 1.0])
    return (centres[labels] + noise) * scales + torch.tensor([7.0, 0.0, -3.0, 100.0, 0.0]), labels


def solve_directly(features, labels, classes, l2):
    """Minimise the documented objective with torch, on features standardised by hand."""
    features = features.double()
    mean, scale = features.mean(0), features.std(0, correction=0)
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logits = ((features - mean) / scale) @ weight.T + bias
        loss = cross_entropy(logits, labels, reduction="sum") + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (weight / scale).detach(), (bias - weight @ (mean / scale)).detach()


@pytest.mark.parametrize("l2", [0.5, 20.0])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_probe_is_the_minimum_of_the_penalised_likelihood(classes, l2):
    features, labels = blobs(classes)
    weight, bias = fit_linear_probe(features, labels, classes, l2)
    expected_weight, expected_bias = solve_directly(features, labels, classes, l2)
    probabilities = (features @ weight.T + bias).softmax(1)
    expected = (features.double() @ expected_weight.T + expected_bias).softmax(1)
    torch.testing.assert_close(probabilities.double(), expected, atol=2e-4, rtol=0)


def test_result_has_the_documented_shapes_and_dtypes():
    features, labels = blobs(3)
    weight, bias = fit_linear_probe(features.double(), labels, 4)
    assert (weight.shape, bias.shape) == ((4, 5), (4,))
    assert weight.dtype == bias.dtype == torch.float32


def test_same_input_gives_the_same_bits():
    features, labels = blobs(4)
    first, second = fit_linear_probe(features, labels, 4), fit_linear_probe(features, labels, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_separates_blobs():
    features, labels = blobs(4)
    weight, bias = fit_linear_probe(features, labels, 4)
    assert ((features @ weight.T + bias).argmax(1) == labels).float().mean() > 0.9


def test_more_regularisation_gives_smaller_weights():
    features, labels = blobs(3)
    norms = [fit_linear_probe(features, labels, 3, l2)[0].norm() for l2 in (0.1, 10.0, 1000.0)]
    assert norms[0] > norms[1] > norms[2]


@pytest.mark.parametrize("present", [[1, 3], [0, 1, 4]])
def test_classes_without_samples_never_win_on_any_features(present):
    features, labels = blobs(len(present))
    weight, bias = fit_linear_probe(features, torch.tensor(present)[labels], 5)
    absent = [label for label in range(5) if label not in present]
    elsewhere = torch.randn(2000, 5, generator=torch.Generator().manual_seed(1)) * 300
    probabilities = (elsewhere @ weight.T + bias).softmax(1)
    assert (weight[absent] == 0).all()
    assert (bias[absent] == ABSENT_BIAS).all()
    assert probabilities[:, absent].max() < 1e-8


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_weights_and_biases_of_classes_with_samples_sum_to_zero(classes):
    features, labels = blobs(classes)
    weight, bias = fit_linear_probe(features, labels, classes + 1)
    assert weight[:classes].sum(0).abs().max() < 1e-6 * weight.abs().max()
    assert bias[:classes].sum().abs() < 1e-5 * bias[:classes].abs().max()


def test_a_single_class_always_wins():
    weight, bias = fit_linear_probe(torch.randn(8, 3), torch.full((8,), 2), 4)
    assert (torch.randn(100, 3) @ weight.T + bias).argmax(1).unique().tolist() == [2]


def test_features_that_are_dead_up_to_rounding_get_no_weight():
    """As two of the 384 of a real pretrained sentence encoder, which are 1e-32 and 1e-9."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 4, generator=generator) * torch.tensor([1.0, 1e-32, 1e-9, 0.5])
    weight, _ = fit_linear_probe(features, torch.arange(40) % 3, 3)
    assert weight[:, 1:3].eq(0).all()
    assert 0 < weight.abs().max() < 10


def test_constant_features_get_no_weight():
    features, labels = blobs(3)
    features[:, 1] = 0.1  # not exact in binary: its computed variance must not be amplified
    weight, bias = fit_linear_probe(features, labels, 3)
    assert (weight[:, 1] == 0).all()
    assert bias.isfinite().all()


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), r"\[0, 3\]"),
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), r"\[4, 3\] and labels \[5\]"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long), r"features \[N, D\]"),
        (torch.tensor([[1.0], [float("nan")]]), torch.tensor([0, 1]), "1 of 2 samples have NaN"),
        (torch.tensor([[1.0], [float("inf")]]), torch.tensor([0, 1]), "1 of 2 samples have NaN or infinite"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "Label 3 is not one of 3 classes"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "Label -1"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "torch.float32"),
    ],
)
def test_unusable_input_is_refused(features, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(features, labels, 3)


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan")])
def test_l2_must_be_positive(l2):
    features, labels = blobs(2)
    with pytest.raises(ValueError, match="must be positive"):
        fit_linear_probe(features, labels, 2, l2)


def dataset(count=10):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count))


def test_features_keep_the_order_of_the_dataset_whatever_the_batch_size():
    data = dataset()
    features, labels = extract_features(nn.Flatten(), data, batch_size=3)
    torch.testing.assert_close(features, data.tensors[0].flatten(1))
    assert labels.tolist() == list(range(10))


def test_features_are_taken_in_eval_mode_and_flags_and_statistics_put_back():
    norm = nn.BatchNorm2d(1)
    backbone = nn.Sequential(norm, nn.Dropout(0.5).eval(), nn.Flatten()).train()
    backbone[1].eval()
    features, _ = extract_features(backbone, dataset())
    torch.testing.assert_close(features, dataset().tensors[0].flatten(1) / np.sqrt(1 + norm.eps))
    assert [module.training for module in backbone] == [True, False, True]
    assert (norm.running_mean.item(), norm.num_batches_tracked.item()) == (0.0, 0)
    assert not features.requires_grad


def test_features_do_not_advance_the_global_random_state():
    before = torch.get_rng_state()
    extract_features(nn.Flatten(), dataset())
    assert torch.equal(torch.get_rng_state(), before)


def test_training_flags_are_put_back_after_an_error():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        extract_features(backbone, dataset())
    assert all(module.training for module in backbone.modules())


def test_a_backbone_returning_maps_is_refused():
    with pytest.raises(ValueError, match=r"returned \[10, 1, 4, 4\].*features are \[B, D\]"):
        extract_features(nn.Identity(), dataset())


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="no samples in TensorDataset"):
        extract_features(nn.Flatten(), dataset(0))


@pytest.mark.parametrize("targets", [torch.arange(10) / 2, (torch.arange(10) / 2).tolist()])
def test_labels_that_are_no_integers_are_refused_and_not_rounded(targets):
    images = dataset().tensors[0]
    with pytest.raises(ValueError, match="labels of a linear probe are integers, found torch.float"):
        extract_features(nn.Flatten(), list(zip(images, targets, strict=True)))

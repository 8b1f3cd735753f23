import math

import pytest
import torch

from lightning_odem.calibration.distributions import entropy, kl_divergence

FP64 = torch.float64
INFINITE = float("inf")


def make_logits(*seeds, size=5, classes=4, dtype=FP64):
    return [3 * torch.randn(size, classes, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in seeds]


def by_hand(logits, reference):
    """Mean divergence from plain Python numbers."""
    total = 0.0
    for z, z_star in zip(logits.tolist(), reference.tolist(), strict=True):
        q, p = ([math.exp(value) / sum(map(math.exp, row)) for value in row] for row in (z, z_star))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(logits)


def test_the_divergence_is_that_of_the_reference_from_the_logits():
    logits, reference = make_logits(0, 1)
    assert kl_divergence(logits, reference).item() == pytest.approx(by_hand(logits, reference), rel=1e-13)
    assert kl_divergence(logits, reference) != kl_divergence(reference, logits)


def test_its_gradient_is_the_difference_of_the_probabilities():
    logits, reference = make_logits(0, 1)
    kl_divergence(logits.requires_grad_(), reference).backward()
    p, p_star = (z.detach().exp() / z.detach().exp().sum(1, keepdim=True) for z in (logits, reference))
    torch.testing.assert_close(logits.grad, (p - p_star) / 5, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_vanish_at_the_reference(dtype):
    (logits,) = make_logits(2, dtype=dtype)
    loss = kl_divergence(logits.clone().requires_grad_(), logits)
    assert (loss.item(), loss.dtype) == (0.0, torch.float32)
    logits.requires_grad_()
    kl_divergence(logits, logits.detach()).backward()
    assert logits.grad.abs().max() < 1e-7


def test_logits_kept_in_another_precision_are_compared():
    logits, reference = make_logits(0, 1)
    rounded = kl_divergence(logits, reference.to(torch.bfloat16))
    assert rounded.dtype == FP64
    assert rounded.item() == pytest.approx(by_hand(logits, reference), rel=0.05)


@pytest.mark.parametrize("classes", [2, 10])
def test_equal_scores_have_the_entropy_log_c(classes):
    assert entropy(torch.full((3, classes), 7.0, dtype=FP64)).item() == pytest.approx(math.log(classes), rel=1e-14)


def test_the_entropy_of_two_classes_and_its_gradient_are_those_of_a_coin():
    z = torch.tensor([[0.0, 1.5], [0.0, -0.5]], dtype=FP64, requires_grad=True)
    loss = entropy(z)
    loss.backward()
    for row, gradient in zip(z.tolist(), z.grad.tolist(), strict=True):
        p = 1 / (1 + math.exp(-row[1]))
        # dH/dz = p (1 - p) log((1 - p) / p) = -p (1 - p) z
        assert gradient[1] == pytest.approx(-p * (1 - p) * row[1] / 2, rel=1e-12)
    coins = [1 / (1 + math.exp(-row[1])) for row in z.tolist()]
    expected = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in coins) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-13)


def test_large_scores_do_not_overflow():
    logits = torch.tensor([[0.0, 2000.0], [500.0, -500.0]])
    assert entropy(logits) == 0.0
    assert kl_divergence(logits, logits.flip(1)) == 1500.0


def test_masked_classes_count_nothing():
    logits, reference = make_logits(0, 1)
    masked = [torch.cat([z, torch.full((5, 1), -INFINITE, dtype=FP64)], dim=1).requires_grad_() for z in make_logits(0)]
    wide = torch.cat([reference, torch.full((5, 1), -INFINITE, dtype=FP64)], dim=1)
    for function, narrow in (
        (lambda z: kl_divergence(z, wide), kl_divergence(logits, reference)),
        (entropy, entropy(logits)),
    ):
        loss = function(masked[0])
        torch.testing.assert_close(loss.detach(), narrow, rtol=1e-13, atol=0)
        (gradient,) = torch.autograd.grad(loss, masked[0])
        assert gradient.isfinite().all()
        assert not gradient[:, -1].any()

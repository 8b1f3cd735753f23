import pytest
import torch

from lightning_odem.flow import RectifiedField, TransportField, field

FP64 = torch.float64


def velocity_vector(velocity):
    out = torch.zeros_like(velocity.theta)
    velocity.add_to(out, 1.0)
    return out


def random_case(seed, d=50):
    return torch.randn(3, d, generator=torch.Generator().manual_seed(seed), dtype=FP64).unbind()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("delta_loss", [-1.0, 0.0, 0.5, 100.0])
def test_the_velocity_is_that_of_the_projections_written_out(seed, delta_loss):
    theta, theta1, g = random_case(seed)
    t = 0.3
    u = (theta1 - theta) / (1 - t)
    parallel = (u @ g) / (g @ g) * g
    gamma = 1.0 if g @ u <= 0 else float(torch.clamp(delta_loss / (g @ u), 0, 1))
    velocity = RectifiedField()(t, theta, theta1, g, delta_loss)
    expected = u - parallel + gamma * parallel
    torch.testing.assert_close(velocity_vector(velocity), expected)
    assert velocity.gamma == pytest.approx(gamma)
    assert velocity.alignment == pytest.approx(float(g @ u))
    assert velocity.alignment_ratio == pytest.approx(float(parallel.norm() / u.norm()))
    assert velocity.norm == pytest.approx(float(expected.norm()))


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_rises_no_faster_than_the_budget(seed):
    theta, theta1, g = random_case(seed)
    for delta_loss in (-1.0, 0.3, 2.0):
        rate = float(velocity_vector(RectifiedField()(0.0, theta, theta1, g, delta_loss)) @ g)
        assert rate <= max(delta_loss, 0.0) + 1e-10


def test_transport_ignores_the_gradient():
    theta, theta1, g = random_case(0)
    velocity = TransportField()(0.5, theta, theta1, g, -1.0)
    torch.testing.assert_close(velocity_vector(velocity), 2 * (theta1 - theta))


def test_blocks_do_not_change_the_result(monkeypatch):
    theta, theta1, g = random_case(1, d=1000)
    whole = RectifiedField()(0.1, theta, theta1, g, -1.0)
    monkeypatch.setattr(field, "_BLOCK", 64)
    parts = RectifiedField()(0.1, theta, theta1, g, -1.0)
    torch.testing.assert_close(velocity_vector(parts), velocity_vector(whole))
    assert parts.norm == pytest.approx(whole.norm)


def test_sums_are_accumulated_in_double_precision():
    # 1e8 + 1 ones summed in fp32 would stay at 2^24 or lose the odd one.
    n = (1 << 24) + 3
    theta, theta1 = torch.zeros(n), torch.ones(n)
    assert RectifiedField()(0.0, theta, theta1, torch.ones(n), 1.0).alignment == n


def test_a_velocity_can_be_added_to_its_own_point():
    theta, theta1, g = random_case(2)
    expected = theta.clone()
    velocity = RectifiedField()(0.0, theta, theta1, g, -1.0)
    velocity.add_to(expected, 0.1)
    velocity.add_to(theta, 0.1)
    assert torch.equal(theta, expected)

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_odem.flow import RectifiedField, TransportField, Velocity
from lightning_odem.flow import blocks as flow_blocks

FP64 = torch.float64
# Matrices of 4 and 3 rows with a bias each, as tensors and as rows.
TENSORS, ROWS = torch.tensor([20, 4, 21, 5]), torch.tensor([5] * 4 + [4] + [7] * 3 + [5])
GRANULARITIES = {"vector": "vector", "tensor": TENSORS, "row": ROWS, "coordinate": "coordinate"}
every_granularity = pytest.mark.parametrize("blocks", GRANULARITIES.values(), ids=GRANULARITIES.keys())


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


@every_granularity
def test_pieces_do_not_change_the_result(monkeypatch, blocks):
    theta, theta1, g = random_case(1)
    whole = RectifiedField(blocks)(0.1, theta, theta1, g, -1.0)
    expected = velocity_vector(whole)
    monkeypatch.setattr(flow_blocks, "_PIECE", 4)
    parts = RectifiedField(blocks)(0.1, theta, theta1, g, -1.0)
    torch.testing.assert_close(velocity_vector(parts), expected)
    assert (parts.alignment, parts.norm) == pytest.approx((whole.alignment, whole.norm))


def test_sums_are_accumulated_in_double_precision():
    # 1e8 + 1 ones summed in fp32 would stay at 2^24 or lose the odd one.
    n = (1 << 24) + 3
    theta, theta1 = torch.zeros(n), torch.ones(n)
    assert RectifiedField()(0.0, theta, theta1, torch.ones(n), 1.0).alignment == n


@pytest.mark.parametrize("blocks", ["coordinate", torch.tensor([1, 9_999]), torch.tensor([10_000])])
def test_sums_over_blocks_are_accumulated_in_double_precision_too(blocks):
    theta1 = torch.ones(10_000)
    theta1[0] = 1e8  # in fp32 the ones after it would be lost
    velocity = RectifiedField(blocks)(0.0, torch.zeros(10_000), theta1, torch.ones(10_000), 1e8)
    assert velocity.alignment == 1e8 + 9_999
    assert velocity.gamma == 1e8 / (1e8 + 9_999)


@every_granularity
def test_a_velocity_can_be_added_to_its_own_point(blocks):
    theta, theta1, g = random_case(2)
    expected = theta.clone()
    velocity = RectifiedField(blocks)(0.0, theta, theta1, g, -1.0)
    velocity.add_to(expected, 0.1)
    velocity.add_to(theta, 0.1)
    assert torch.equal(theta, expected)


def by_loop(t, theta, theta1, grad, delta_loss, lengths):
    """The blockwise rule written out with a loop over blocks: v, gamma and sum_b P_b u."""
    transport = (theta1 - theta) / (1 - t)
    blocks = list(zip(grad.split(lengths), transport.split(lengths), strict=True))
    rise = sum(max(float(g @ u), 0.0) for g, u in blocks)
    gamma = min(max(delta_loss, 0.0) / rise, 1.0) if rise else 1.0
    along = [(g @ u) / (g @ g) * g if g.any() else torch.zeros_like(g) for g, u in blocks]
    parts = [u - (1 - gamma) * p if g @ u > 0 else u for (g, u), p in zip(blocks, along, strict=True)]
    return torch.cat(parts), gamma, torch.cat(along)


@every_granularity
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("delta_loss", [-1.0, 0.0, 3.0, 100.0])
def test_every_granularity_is_the_rule_written_out_block_by_block(blocks, seed, delta_loss):
    theta, theta1, g = random_case(seed)
    g[20:24] = 0.0
    lengths = {"vector": [50], "coordinate": [1] * 50}[blocks] if isinstance(blocks, str) else blocks.tolist()
    expected, gamma, along = by_loop(0.3, theta, theta1, g, delta_loss, lengths)
    velocity = RectifiedField(blocks)(0.3, theta, theta1, g, delta_loss)
    transport = (theta1 - theta) / 0.7
    torch.testing.assert_close(velocity_vector(velocity), expected)
    assert velocity.gamma == pytest.approx(gamma)
    assert velocity.alignment == pytest.approx(float(g @ transport))
    assert velocity.alignment_ratio == pytest.approx(float(along.norm() / transport.norm()))
    assert velocity.norm == pytest.approx(float(expected.norm()))
    assert velocity.damped_share == pytest.approx(float((transport - expected).norm() / transport.norm()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, FP64])
@pytest.mark.parametrize("delta_loss", [-1.0, 0.3])
def test_one_block_gives_the_papers_rule_bit_by_bit(seed, dtype, delta_loss):
    theta, theta1, g = (vector.to(dtype) for vector in random_case(seed, d=333))
    distance, slope = (theta1 - theta).double(), g.double()
    alignment = 1 / (1 - 0.3) * distance.dot(slope).item()
    gamma = 1.0 if alignment <= 0 else min(max(delta_loss / alignment, 0.0), 1.0)
    damping = (1 - gamma) * (alignment / slope.dot(slope).item())
    expected = theta.clone().add_(theta1 - theta, alpha=0.05 * (1 / (1 - 0.3)))
    if damping:
        expected.add_(g, alpha=-0.05 * damping)
    velocity = RectifiedField()(0.3, theta, theta1, g, delta_loss)
    velocity.add_to(theta, 0.05)
    assert (velocity.alignment, velocity.gamma) == (alignment, gamma)
    assert torch.equal(theta, expected)


@pytest.mark.parametrize(("one", "other"), [("vector", torch.tensor([50])), ("coordinate", torch.ones(50).long())])
def test_lengths_reach_the_same_rule_as_the_names(one, other):
    case = random_case(4)
    named, lengths = (RectifiedField(blocks)(0.2, *case, 0.7) for blocks in (one, other))
    torch.testing.assert_close(velocity_vector(named), velocity_vector(lengths))
    for name in ("alignment", "gamma", "alignment_ratio", "norm", "damped_share"):
        assert getattr(named, name) == pytest.approx(getattr(lengths, name))


@pytest.mark.parametrize(
    ("blocks", "gamma", "expected", "ratio", "damped"),
    [
        # <g, u> = 3 and ||g||^2 = 6: P u = g / 2, of which half is taken out.
        ("vector", 0.5, [0.5, 1.25, 1.75], (1.5 / 6) ** 0.5, (0.375 / 6) ** 0.5),
        # <g_b, u_b> = 1 and 2, ||g_b||^2 = 5 and 1: P_b u = (0.4, -0.2) and 2; half of both is taken out.
        (torch.tensor([2, 1]), 0.5, [0.8, 1.1, 1.0], (4.2 / 6) ** 0.5, (1.05 / 6) ** 0.5),
        # g_i u_i = 2, -1 and 2: the first and the last share 1.5.
        ("coordinate", 0.375, [0.375, 1.0, 0.75], 1.0, 0.625 * (5 / 6) ** 0.5),
    ],
)
def test_a_case_done_by_hand(blocks, gamma, expected, ratio, damped):
    theta, theta1, g = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 2.0], [2.0, -1.0, 1.0]], dtype=FP64)
    velocity = RectifiedField(blocks)(0.0, theta, theta1, g, 1.5)
    torch.testing.assert_close(velocity_vector(velocity), torch.tensor(expected, dtype=FP64))
    assert (velocity.alignment, velocity.gamma) == pytest.approx((3.0, gamma))
    assert (velocity.alignment_ratio, velocity.damped_share) == pytest.approx((ratio, damped))


@every_granularity
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("delta_loss", [-1.0, 0.3, 2.0])
def test_no_granularity_lets_the_loss_rise_faster_than_the_budget(blocks, seed, delta_loss):
    theta, theta1, g = random_case(seed)
    rate = float(velocity_vector(RectifiedField(blocks)(0.0, theta, theta1, g, delta_loss)) @ g)
    assert rate <= max(delta_loss, 0.0) + 1e-10


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("delta_loss", [-1.0, 0.5, 5.0])
def test_finer_blocks_damp_more(seed, delta_loss):
    velocities = [RectifiedField(blocks)(0.0, *random_case(seed), delta_loss) for blocks in GRANULARITIES.values()]
    gammas, shares = [velocity.gamma for velocity in velocities], [velocity.damped_share for velocity in velocities]
    assert gammas == sorted(gammas, reverse=True)
    assert shares == sorted(shares)


@every_granularity
def test_downhill_blocks_move_as_if_nothing_were_damped(blocks):
    theta, theta1, _ = random_case(5)
    g = theta - theta1
    velocity = RectifiedField(blocks)(0.0, theta, theta1, g, -1.0)
    assert (velocity.gamma, velocity.damped_share) == (1.0, 0.0)
    assert torch.equal(velocity_vector(velocity), velocity_vector(TransportField()(0.0, theta, theta1, g, -1.0)))


def test_without_a_budget_uphill_entries_stay_bit_by_bit():
    theta, theta1, g = (vector.float() for vector in random_case(6, d=1000))
    moved = theta.clone()
    RectifiedField("coordinate")(0.7, theta, theta1, g, 0.0).add_to(moved, 0.05)
    uphill = g * (theta1 - theta) > 0
    assert torch.equal(moved[uphill], theta[uphill])
    torch.testing.assert_close(moved[~uphill], torch.lerp(theta, theta1, 0.05 / 0.3)[~uphill])


def test_slopes_whose_products_underflow_still_have_a_direction():
    theta, theta1, g = torch.zeros(2), torch.tensor([1e-25, -1e-25]), torch.tensor([1e-25, 1e-25])
    for blocks in ("coordinate", torch.tensor([1, 1])):
        assert velocity_vector(RectifiedField(blocks)(0.0, theta, theta1, g, 0.0)).tolist() == [0.0, theta1[1].item()]


@pytest.mark.parametrize("blocks", ["coordinate", torch.tensor([1, 1])])
def test_a_gradient_as_small_as_can_be_is_taken_out_like_any_other(blocks):
    theta, theta1, g = torch.zeros(2), torch.tensor([3.0, 4.0]), torch.tensor([1e-44, 1.0])
    assert velocity_vector(RectifiedField(blocks)(0.0, theta, theta1, g, 0.0)).tolist() == [0.0, 0.0]


def test_entries_without_gradient_are_free_and_not_along_it():
    theta, theta1, g = torch.zeros(2), torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    velocity = RectifiedField("coordinate")(0.0, theta, theta1, g, -1.0)
    assert velocity_vector(velocity).tolist() == [3.0, 0.0]
    assert velocity.alignment_ratio == velocity.damped_share == pytest.approx(0.8)


@every_granularity
def test_no_temporary_is_as_long_as_the_vectors(monkeypatch, blocks):
    monkeypatch.setattr(flow_blocks, "_PIECE", 50)
    repeats = 40
    theta, theta1, g = random_case(7, d=50 * repeats)
    rectified = RectifiedField(blocks if isinstance(blocks, str) else blocks.repeat(repeats))
    known = {vector.untyped_storage().data_ptr() for vector in (theta, theta1, g)}
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                sizes.append(result.untyped_storage().nbytes() // 8)
            return result

    with Watch():
        rectified(0.1, theta, theta1, g, -1.0).add_to(theta, 0.1)
    per_block = 0 if isinstance(blocks, str) else 2 * (len(blocks) + 1) * repeats
    assert 50 <= max(sizes) <= max(50, per_block) < len(theta)


def test_a_velocity_of_ones_own_needs_no_blocks():
    theta, theta1, g = torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])
    velocity = Velocity(theta, theta1, g, 2.0, 0.5, alignment=2.0, gamma=0.75, alignment_ratio=0.7, norm=2.5)
    assert velocity_vector(velocity).tolist() == [1.5, 2.0]


@pytest.mark.parametrize("blocks", ["row", torch.tensor([2.0]), torch.tensor([0, 3]), torch.ones(2, 2).long()])
def test_blocks_that_are_none_are_refused(blocks):
    with pytest.raises(ValueError, match="of lengths, got 'row'|integers >= 1"):
        RectifiedField(blocks)


def test_blocks_that_do_not_fit_the_vectors_are_refused():
    with pytest.raises(ValueError, match="hold 50 entries in all, the vectors 49"):
        RectifiedField(ROWS)(0.0, *random_case(0, d=49), 0.0)

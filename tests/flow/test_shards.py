"""The flow on vectors of which several processes hold a part each; here the processes are threads."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from lightning_odem.flow import Euler, Heun, RectifiedField, integrate
from lightning_odem.flow import blocks as flow_blocks

FP64 = torch.float64
# Entries per block in each of three shards. The first and the last block lie in several; one shard has no entries.
SPLIT = torch.tensor([True, False, True, False, True])
LENGTHS = torch.tensor([[3, 4, 0, 0, 40], [0, 0, 0, 0, 0], [30, 0, 2, 6, 0]])
SIZES = LENGTHS.sum(1).tolist()


class Sum:
    """Sums numbers over threads, and counts how often."""

    def __init__(self):
        self.parts, self.barrier, self.lengths = [None] * len(SIZES), Barrier(len(SIZES)), []

    def of(self, rank):
        def sum_(numbers):
            assert numbers.dtype == FP64
            assert numbers.device.type == "cpu"
            self.parts[rank] = numbers.clone()
            self.barrier.wait(10)
            numbers.copy_(sum(self.parts))
            self.barrier.wait(10)
            if rank == 0:
                self.lengths.append(len(numbers))

        return sum_


def own_blocks(rank):
    """Blocks that are not split are listed where they lie."""
    listed = SPLIT | (LENGTHS[rank] > 0)
    return LENGTHS[rank][listed], SPLIT[listed]


def make_field(kind, rank, sum_):
    if kind == "lengths":
        lengths, split = own_blocks(rank)
        return RectifiedField(lengths, sum_, split)
    return RectifiedField(kind, sum_)


def whole_field(kind):
    return RectifiedField(LENGTHS.T.flatten().reshape(5, 3).sum(1) if kind == "lengths" else kind)


def order(kind):
    """Where the entries of the shards, one after the other, lie in the whole vector, whose blocks are in one piece."""
    if kind != "lengths":
        return torch.arange(sum(SIZES))
    owner = torch.cat([torch.arange(5).repeat_interleave(LENGTHS[rank]) for rank in range(3)])
    return owner.argsort(stable=True).argsort()


def vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, sum(SIZES), generator=generator, dtype=FP64)


def on_shards(function):
    """What a function of (rank, sum_) gives on every shard, and the sums."""
    sums = Sum()
    with ThreadPoolExecutor(len(SIZES)) as pool:
        return list(pool.map(lambda rank: function(rank, sums.of(rank)), range(len(SIZES)))), sums.lengths


@pytest.fixture(params=[1 << 17, 7], ids=["one piece", "many pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(flow_blocks, "_PIECE", request.param)


@pytest.mark.parametrize(("kind", "numbers"), [("vector", 3), ("coordinate", 5), ("lengths", 5 + 2 * 3)])
@pytest.mark.parametrize("delta_loss", [-1.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_a_field_on_shards_is_that_on_whole_vectors(piece, kind, numbers, delta_loss, seed):
    theta, theta1, grad = vectors(seed)
    expected = whole_field(kind)(0.3, *(v[order(kind).argsort()] for v in (theta, theta1, grad)), delta_loss)
    moved = torch.zeros_like(theta)
    expected.add_to(moved, 1.0)

    def evaluate(rank, sum_):
        own = [vector.split(SIZES)[rank] for vector in (theta, theta1, grad)]
        velocity = make_field(kind, rank, sum_)(0.3, *own, delta_loss)
        out = torch.zeros_like(own[0])
        velocity.add_to(out, 1.0)
        return velocity, out

    found, sums = on_shards(evaluate)
    assert sums == [numbers]
    torch.testing.assert_close(torch.cat([out for _, out in found]), moved[order(kind)], rtol=1e-12, atol=1e-14)
    for velocity, _ in found:
        for name in ("alignment", "gamma", "alignment_ratio", "norm", "damped_share"):
            assert getattr(velocity, name) == pytest.approx(getattr(expected, name), rel=1e-12), name


@pytest.mark.parametrize("rule", [Euler, Heun])
def test_a_path_on_shards_is_that_of_the_whole_vectors(rule):
    theta, theta1, centre = vectors(5)
    top = (theta + theta1 + 0.1 * centre) / 2

    def hill(point, top):
        return -float((point - top).square().sum()), 2 * (top - point)

    expected = integrate(
        theta, theta1, lambda point: hill(point, top), 0.5, step_size=0.1, field=RectifiedField(), solver=rule()
    )

    def follow(rank, sum_):
        own, own1, own_top = (vector.split(SIZES)[rank] for vector in (theta, theta1, top))

        def loss_and_grad(point):
            value, grad = hill(point, own_top)
            numbers = torch.tensor([value], dtype=FP64)
            sum_(numbers)
            return numbers.item(), grad

        field = RectifiedField("vector", sum_)
        return integrate(own, own1, loss_and_grad, 0.5, step_size=0.1, field=field, solver=rule())

    found, _ = on_shards(follow)
    torch.testing.assert_close(torch.cat([path.theta for path in found]), expected.theta, rtol=1e-12, atol=1e-14)
    assert max(expected.damped_share) > 0.0
    for path in found:
        for key, values in expected.as_dict().items():
            assert path.as_dict()[key] == pytest.approx(values, rel=1e-12), key


def test_a_shard_without_blocks_takes_part_in_the_sums():
    def evaluate(rank, sum_):
        lengths = torch.tensor([2] if rank == 0 else [], dtype=torch.int64)
        field = RectifiedField(lengths, sum_, torch.zeros(len(lengths), dtype=torch.bool))
        theta = torch.zeros(int(lengths.sum()))
        return field(0.0, theta, theta + 1, theta + 2, delta_loss=1.0)

    for velocity in on_shards(evaluate)[0]:
        assert (velocity.alignment, velocity.gamma) == (4.0, 0.25)


def test_only_a_split_block_may_be_empty():
    empty = torch.tensor([0, 2])
    RectifiedField(empty, torch.Tensor.zero_, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="integers >= 1"):
        RectifiedField(empty, torch.Tensor.zero_, torch.tensor([False, True]))

import pytest
import torch

from lightning_odem.methods import IsotropicMerge, MergeContext
from lightning_odem.methods.factored import compact, is_factored, moved, whole
from lightning_odem.methods.needs import BaseModel

SHAPES = {"linear": (64, 96), "convolution": (64, 16, 3)}


def update(shape, rank, seed, directions=None):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(shape[0], rank, generator=generator) if directions is None else directions
    return (columns @ torch.randn(rank, shape[1:].numel(), generator=generator)).view(shape)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_mean_of_updates_kept_as_factors_is_the_mean(kind):
    shape = torch.Size(SHAPES[kind])
    updates = [update(shape, 3, seed) for seed in range(4)]
    mean, kept = updates[0], compact(updates[0], 3)
    for number, each in enumerate(updates[1:], start=2):
        mean, kept = mean.lerp(each, 1 / number), moved(kept, compact(each, 3), 1 / number, shape)
        assert kept.shape == (shape[0] + shape[1:].numel(), 3 * number)
        torch.testing.assert_close(whole(kept, shape), mean, rtol=1e-5, atol=1e-5)


def test_directions_that_updates_share_are_kept_once():
    shape = torch.Size((64, 96))
    directions = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    kept = compact(update(shape, 3, 0, directions), 3)
    for seed in range(1, 9):
        kept = moved(kept, compact(update(shape, 3, seed, directions), 3), 0.5, shape)
    assert kept.shape == (160, 3)


def test_an_update_taken_out_again_leaves_the_others():
    shape = torch.Size((64, 96))
    one, two = update(shape, 3, 0), update(shape, 3, 1)
    both = moved(compact(one, 3), compact(two, 3), 0.5, shape)
    left = moved(both, compact(two, 3), -1.0, shape)
    torch.testing.assert_close(whole(left, shape), one, rtol=1e-5, atol=1e-5)


def test_factors_that_are_no_smaller_than_the_matrix_become_the_matrix():
    shape = torch.Size((64, 96))
    mean, kept, sizes = update(shape, 3, 0), compact(update(shape, 3, 0), 3), []
    for seed in range(1, 16):
        each = update(shape, 3, seed)
        mean, kept = mean.lerp(each, 0.3), moved(kept, compact(each, 3), 0.3, shape)
        sizes.append(kept.numel())
    assert kept.shape == shape
    assert max(sizes) == shape.numel()
    torch.testing.assert_close(kept, mean, rtol=1e-4, atol=1e-5)


def test_an_update_of_no_change_takes_the_room_of_one_direction():
    kept = compact(torch.zeros(64, 96), 3)
    assert kept.shape == (160, 1)
    assert not whole(kept, (64, 96)).any()


def test_sums_of_an_exact_stream_are_as_large_as_the_adapters_and_give_the_same():
    shape = torch.Size((64, 96))
    tasks = [torch.cat([update(shape, 2, seed).flatten(), torch.full((5,), float(seed))]) for seed in range(4)]

    def run(ranks):
        method, context = (
            IsotropicMerge(),
            MergeContext(["update", "bias"], [shape, (5,)], {BaseModel: torch.zeros(len(tasks[0]))}, ranks=ranks),
        )
        merged = method.start(tasks[0], context).theta
        for number, task in enumerate(tasks[1:], start=2):
            merged = method.merge(merged, task, 1 / number, context).theta
        left = method.remove(
            merged,
            tasks[1],
            0.25,
            MergeContext(context.names, context.shapes, context.needed, ranks=ranks, shares=[0.25] * 4),
        ).theta
        return method.state_dict()["mean"]["update"], merged, left

    (kept, *found), (dense, *expected) = run({"update": 2}), run({})
    assert is_factored(kept, shape)
    assert dense.shape == shape
    assert kept.numel() <= 8 * sum(shape)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

import math
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_odem.calibration.quota import allocate, balanced_order

capacities = st.integers(1, 60)
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8)
shares = st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 1.0, 1.1, 2.0, 3.0, 7.5, 1e6])
labels = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(torch.tensor)
seeds = st.integers(0, 2**20).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def requests(draw):
    available = draw(sizes)
    given_shares = draw(st.lists(shares, min_size=len(available), max_size=len(available)).filter(any))
    return draw(capacities), given_shares, available


def deal(capacity, available):
    """Equal shares by hand: one place after the other, round by round, to every task that has a sample left."""
    places, turns = [0] * len(available), cycle(range(len(available)))
    while sum(places) < min(capacity, sum(available)):
        task = next(turns)
        places[task] += places[task] < available[task]
    return places


@given(capacities, sizes)
@settings(deadline=None)
def test_equal_shares_are_dealt_round_by_round(capacity, available):
    assert allocate(capacity, [1.0] * len(available), available) == deal(capacity, available)


@given(requests())
@settings(deadline=None)
def test_no_place_is_lost_or_invented(request):
    capacity, given_shares, available = request
    places = allocate(*request)
    usable = [size if share else 0 for share, size in zip(given_shares, available, strict=True)]
    assert sum(places) == min(capacity, sum(usable))
    assert all(0 <= place <= size for place, size in zip(places, usable, strict=True))


@given(requests())
@settings(deadline=None)
def test_places_differ_from_the_exact_quota_by_less_than_one(request):
    capacity, given_shares, _ = request
    places = allocate(capacity, given_shares, [capacity] * len(given_shares))
    exact = [capacity * share / sum(given_shares) for share in given_shares]
    assert all(abs(place - quota) < 1 for place, quota in zip(places, exact, strict=True))


@given(capacities, sizes, st.integers(0, 40))
@settings(deadline=None)
def test_with_equal_shares_no_task_gains_a_place_when_another_joins(capacity, available, size):
    before = allocate(capacity, [1.0] * len(available), available)
    after = allocate(capacity, [1.0] * (len(available) + 1), [*available, size])
    assert all(new <= old for new, old in zip(after[:-1], before, strict=True))


@pytest.mark.parametrize(("capacity", "given_shares"), [(2, [3, 1]), (2, [1, 4, 1]), (2, [1, 10, 3]), (2, [2, 8, 2])])
def test_the_scale_of_the_shares_does_not_decide_between_equal_remainders(capacity, given_shares):
    available = [100] * len(given_shares)
    expected = allocate(capacity, given_shares, available)
    for scale in (0.1, 0.3, 0.7, 10.0, 1 / 7):
        assert allocate(capacity, [scale * share for share in given_shares], available) == expected


def test_a_task_without_share_gets_no_place():
    assert allocate(10, [1.0, 0.0, 3.0], [100, 100, 5]) == [5, 0, 5]


@given(labels, seeds)
@settings(deadline=None)
def test_every_prefix_of_the_order_is_class_balanced(labels, generator):
    order = balanced_order(labels, len(labels), generator)
    assert sorted(order.tolist()) == list(range(len(labels)))
    available = labels.bincount(minlength=5)
    for size in range(len(labels) + 1):
        counts = labels[order[:size]].bincount(minlength=5)
        most = counts.max()
        assert bool(((counts >= most - 1) | (counts == available)).all())


@pytest.mark.parametrize("labels", [None, torch.arange(30) % 3])
def test_the_generator_alone_decides_the_order(labels):
    def order(seed):
        return balanced_order(labels, 30, torch.Generator().manual_seed(seed)).tolist()

    assert order(0) == order(0) != order(1)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 1, 1, 1, 1])])
def test_every_sample_of_a_class_is_as_likely_to_go_first(labels):
    generator = torch.Generator().manual_seed(0)
    repeats = 4000
    firsts = torch.stack([balanced_order(labels, 6, generator)[:2] for _ in range(repeats)])
    chosen = firsts.flatten().bincount(minlength=6) / repeats
    expected = torch.full((6,), 1 / 3) if labels is None else torch.tensor([1.0] + [0.2] * 5)
    assert (chosen - expected).abs().max() < 5 * math.sqrt(0.25 / repeats)

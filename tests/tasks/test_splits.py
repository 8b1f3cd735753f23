import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_odem.tasks.splits import hold_out


@given(
    labels=st.lists(st.integers(0, 5), min_size=2, max_size=200),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_two_parts_are_disjoint_complete_and_of_the_asked_size(labels, fraction, seed):
    stay, held = hold_out(labels, fraction, seed)
    assert sorted([*stay, *held]) == list(range(len(labels)))
    assert len(held) == max(1, round(fraction * len(labels)))


@given(labels=st.lists(st.integers(0, 5), min_size=2, max_size=200), seed=st.integers(0, 1000))
def test_every_class_gives_its_share_to_within_one_sample(labels, seed):
    labels = np.array(labels)
    _, held = hold_out(labels, 0.25, seed)
    share = len(held) / len(labels)
    for label in np.unique(labels):
        assert abs((labels[held] == label).sum() - share * (labels == label).sum()) <= 1


def test_the_cut_depends_on_the_seed_only():
    labels = np.arange(300) % 3
    np.testing.assert_array_equal(hold_out(labels, 0.1, seed=4)[1], hold_out(list(labels), 0.1, seed=4)[1])
    assert not np.array_equal(hold_out(labels, 0.1, seed=4)[1], hold_out(labels, 0.1, seed=5)[1])


@pytest.mark.parametrize(("count", "parts"), [(0, (0, 0)), (1, (0, 1))])
def test_too_few_samples_leave_the_first_part_empty(count, parts):
    assert tuple(map(len, hold_out([0] * count, 0.1, seed=0))) == parts

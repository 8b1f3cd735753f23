import numpy as np
import pytest

from lightning_odem.studies import plan_streams

OPTIONS = {"orders": 3, "weighting": ["uniform", "dirichlet"], "concentration": 0.5, "seeds": [0, 7]}
OPTIONS |= {"calibration_sizes": [8, 16]}
TASKS = ["a", "b", "c"]


def test_there_is_one_stream_for_every_combination():
    plans = plan_streams(TASKS, **OPTIONS)
    assert len({(p.seed, p.calibration_size, p.order, p.weighting) for p in plans}) == len(plans) == 2 * 2 * 3 * 2


def test_orders_are_different_permutations_that_start_with_the_streams_own():
    plans = plan_streams(TASKS, **OPTIONS | {"orders": 6, "weighting": ["uniform"]})
    sequences = {plan.order: plan.tasks for plan in plans}
    assert sequences[0] == ("a", "b", "c")
    assert len(set(sequences.values())) == 6
    assert all(sorted(sequence) == TASKS for sequence in sequences.values())


def test_more_orders_than_there_are_permutations_are_refused():
    with pytest.raises(ValueError, match="3 tasks have 6 orders"):
        plan_streams(TASKS, **OPTIONS | {"orders": 7})


def test_orders_and_weights_are_the_same_for_every_seed_and_size():
    plans = plan_streams(TASKS, **OPTIONS)
    assert len({(p.order, p.weighting, p.tasks, p.weights) for p in plans}) == 6


def test_uniform_weights_are_ones():
    assert {p.weights for p in plan_streams(TASKS, **OPTIONS) if p.weighting == "uniform"} == {(1.0, 1.0, 1.0)}


def test_dirichlet_weights_have_mean_one_and_the_spread_of_their_concentration():
    names = [str(number) for number in range(5)]
    settings = OPTIONS | {"orders": 110, "weighting": ["dirichlet"], "seeds": [0], "calibration_sizes": [8]}
    shares = np.array([plan.weights for plan in plan_streams(names, **settings)]) / 5
    np.testing.assert_allclose(shares.sum(1), 1.0)
    # Variance of a symmetric Dirichlet distribution: (1/K)(1 - 1/K) / (K c + 1).
    assert shares.var() == pytest.approx(0.2 * 0.8 / (5 * 0.5 + 1), rel=0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weighting": ["equal"]}, "Unknown weighting"),
        ({"orders": 0}, "at least one"),
        ({"seeds": []}, "at least one"),
        ({"calibration_sizes": [16, 2]}, "2 calibration samples are too few for 3 tasks"),
        ({"concentration": 0.0}, "positive"),
    ],
)
def test_plans_without_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan_streams(TASKS, **OPTIONS | change)

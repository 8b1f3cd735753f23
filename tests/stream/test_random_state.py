import random

import numpy as np
import pytest
import torch
from lightning import seed_everything
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_odem.stream.random_state import RandomContinuation, load_random_state, random_digest, take_random_state


def numbers():
    return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002


def begun(seed=1):
    seed_everything(seed, verbose=False)
    return RandomContinuation()


def test_a_state_is_plain_and_brings_the_same_numbers_again():
    state = take_random_state()
    expected = numbers()
    assert random_digest(take_random_state()) != random_digest(state)
    load_random_state(state)
    assert random_digest(take_random_state()) == random_digest(state)
    assert numbers() == expected


@pytest.mark.parametrize(
    "draw", [torch.rand, np.random.rand, lambda _: random.random()], ids=["torch", "numpy", "python"]
)
def test_a_number_drawn_changes_the_digest(draw):
    before = random_digest(take_random_state())
    draw(1)
    assert random_digest(take_random_state()) != before


def test_a_new_process_seeded_alike_goes_on_where_the_last_merge_ended():
    stream = begun()
    numbers()
    known = stream.after_merge({})
    expected = numbers()
    stream = begun()
    numbers()
    assert stream.before_task(known, is_new_process=True) == known
    assert numbers() == expected


def test_a_process_seeded_otherwise_keeps_its_numbers():
    stream = begun()
    known = stream.after_merge({})
    other = begun(seed=2)
    expected = random_digest(take_random_state())
    other.before_task(known, is_new_process=True)
    assert random_digest(take_random_state()) == expected


def test_seeds_set_between_tasks_are_noticed_and_respected():
    stream = begun()
    known = stream.before_task(stream.after_merge({}), is_new_process=False)
    assert not known["reseeded"]
    known = stream.after_merge(known)
    seed_everything(7, verbose=False)
    known = stream.before_task(known, is_new_process=False)
    assert known["reseeded"]
    other, expected = begun(), random_digest(take_random_state())
    other.before_task(stream.after_merge(known), is_new_process=True)
    assert random_digest(take_random_state()) == expected


def test_a_training_that_failed_is_not_taken_for_a_seed():
    stream = begun()
    known = stream.before_task(stream.after_merge({}), is_new_process=False)
    numbers()  # the training, without a merge
    assert not stream.before_task(known, is_new_process=False)["reseeded"]


def test_a_merge_that_was_not_kept_is_not_taken_for_the_last():
    stream = begun()
    known = stream.after_merge({})
    stream.after_merge(known)  # its state could not be written
    numbers()
    assert not stream.before_task(known, is_new_process=False)["reseeded"]


def test_nothing_is_known_before_the_first_merge():
    assert begun().before_task({}, is_new_process=True) == {}


def fit_starts(stream, strategy):
    """As Lightning starts one: a strategy for several processes sets the seed anew."""
    if isinstance(strategy, DDPStrategy):
        reset_seed()
    stream.before_fit(strategy)


def test_where_lightning_sets_the_seed_anew_each_task_begins_with_it():
    stream, strategy = begun(), DDPStrategy()
    numbers()
    known = stream.after_merge({})
    fit_starts(stream, strategy)
    expected = random_digest(take_random_state())
    known = stream.before_task(known, is_new_process=False)
    assert not known["reseeded"]
    assert random_digest(take_random_state()) == expected
    stream = begun()
    fit_starts(stream, strategy)
    numbers()  # which build a module
    stream.before_task(known, is_new_process=True)
    assert random_digest(take_random_state()) == expected


def test_without_a_seed_to_set_anew_random_numbers_go_on_under_any_strategy(monkeypatch):
    for strategy in (DDPStrategy(), SingleDeviceStrategy("cpu")):
        stream = begun()
        known = stream.after_merge({})
        expected = numbers()
        stream = begun()
        monkeypatch.delenv("PL_GLOBAL_SEED")  # as if torch.manual_seed had been called instead
        fit_starts(stream, strategy)
        numbers()
        stream.before_task(known, is_new_process=True)
        assert numbers() == expected

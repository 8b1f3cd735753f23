"""Wrong arguments are refused where they are given: every constructor, every argument, values of any kind."""

import inspect
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_odem import CalibrationOptions, ContinualMergeCallback
from lightning_odem.arguments import (
    check_choice,
    check_flag,
    check_integer,
    check_names,
    check_patterns,
    check_range,
    check_seed,
    check_step,
    shown,
)
from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.flow import Descent, RectifiedField, ReusedGradient, StepControl
from lightning_odem.methods import METHODS, FixedTime, Minibatches, SearchedTime
from lightning_odem.methods.representation import RepresentationCorrection
from lightning_odem.tasks import ArrayDataset, DigitsStream, ImageFolderStream, NpzStream, Splits, Task

BAD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 10**5000, 2**63, 2**64, -1, 0]),
    st.floats(),
    st.sampled_from([1e-300, 1e300, -0.0, math.nan, math.inf, 5e-324]),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.complex_numbers(),
    st.sampled_from([Decimal("NaN"), Decimal("1.5"), Fraction(1, 3), np.float32("nan"), np.int64(3), np.zeros(3)]),
    st.sampled_from([torch.zeros(2), torch.tensor(2.5), torch.tensor(3), object(), int, len, Path(".")]),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3) | st.integers(), st.floats() | st.text(max_size=3), max_size=3),
)
DATA = ArrayDataset(np.zeros((4, 8, 8), dtype=np.uint8), [0, 1, 0, 1])


def task(**arguments):
    return Task(**{"name": "a", "num_classes": 2, "splits": lambda: Splits(DATA, DATA, DATA)} | arguments)


def folder_of_tasks(make):
    """A function of a stream's arguments whose folder, unless given, holds no task: the others are checked before."""
    return lambda **arguments: make(**{"root": Path(__file__).parent / "helpers"} | arguments)


def parameters(make, without=()):
    names = inspect.signature(make).parameters
    return [
        name for name, parameter in names.items() if parameter.kind != parameter.VAR_KEYWORD and name not in without
    ]


COMMON = parameters(DigitsStream.__mro__[1], without=("builders",))
MADE = {
    **{name: (method, parameters(method)) for name, method in METHODS.items()},
    "fixed time": (FixedTime, parameters(FixedTime)),
    "searched time": (SearchedTime, parameters(SearchedTime)),
    "minibatches": (Minibatches, parameters(Minibatches)),
    "callback": (ContinualMergeCallback, parameters(ContinualMergeCallback, without=("dirpath",))),
    "calibration": (CalibrationOptions, parameters(CalibrationOptions)),
    "buffer": (CalibrationBuffer, parameters(CalibrationBuffer)),
    "steps": (StepControl, parameters(StepControl)),
    "field": (RectifiedField, ["blocks"]),
    "descent": (
        lambda **changed: Descent(torch.zeros(2), **{"length": 0.1, "steps": 2} | changed),
        ["length", "steps"],
    ),
    "reuse": (ReusedGradient, parameters(ReusedGradient)),
    "correction": (lambda **changed: RepresentationCorrection(**{"method": "average"} | changed), ["method", "lr"]),
    "task": (task, parameters(Task, without=("splits", "source", "prepare", "class_names"))),
    "digits": (DigitsStream, [*COMMON, "image_size"]),
    "npz": (folder_of_tasks(NpzStream), ["root", "channels", "image_size"]),
    "folders": (folder_of_tasks(ImageFolderStream), ["root", "image_size"]),
}
# What messages call an argument where it is not its name.
NAMED = {"rule": ["solver"], "weights": ["weight"], "blocks": ["locks"], "batch_size": ["batch_size", "batch size"]}


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_a_wrong_argument_is_refused_by_name_or_works(name, data):
    make, names = MADE[name]
    if not names:
        return
    argument, value = data.draw(st.sampled_from(names)), data.draw(BAD)
    refusal = ""
    try:
        make(**{argument: value})
    except FileNotFoundError:
        refusal = argument if name in ("npz", "folders") else "no folder is looked for"
    except ValueError as error:
        refusal = str(error) if type(error) is ValueError else repr(error)
    words = NAMED.get(argument, [argument])
    assert not refusal or any(word in refusal for word in words), f"{argument}={value!r}: {refusal}"
    assert len(refusal) < 1500


@pytest.mark.parametrize("value", [1.5, "3", None, True, math.nan, np.zeros(2), torch.tensor([1, 2]), 1 + 2j])
def test_what_is_no_integer_is_refused_as_an_integer(value):
    with pytest.raises(ValueError, match=r"steps must be an integer in \[1, 9\], got steps="):
        check_integer("steps", value, 1, 9)


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.uint8(3), torch.tensor(3)], ids=["int", "int64", "uint8", "tensor"]
)
def test_integers_of_other_libraries_become_integers(value):
    assert type(check_integer("steps", value, 1)) is int


@pytest.mark.parametrize("value", ["1.0", None, True, [1.0], torch.zeros(2), 1j, 10**400])
def test_what_is_no_number_is_refused_as_a_number(value):
    with pytest.raises(ValueError, match=r"lr must be a number in \[0, inf\), got lr="):
        check_range("lr", value, 0)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, 1e300])
def test_a_number_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match="lr must"):
        check_range("lr", value, 0)


def test_an_open_end_is_outside():
    for ends in ({"open_low": True}, {"open_high": True}):
        with pytest.raises(ValueError, match="must lie in"):
            check_range("share", 0.0 if "open_low" in ends else 1.0, 0, 1, **ends)


def test_a_number_keeps_its_value_and_an_integer_its_type():
    assert [check_range("lr", value, 0) for value in (np.float32(0.5), torch.tensor(0.25), Fraction(1, 8))] == [
        0.5,
        0.25,
        0.125,
    ]
    assert type(check_range("lr", 1, 0)) is int


def test_a_step_that_no_path_would_end_with_is_refused():
    with pytest.raises(ValueError, match="step_size must be 1e-06 at least, a million steps, got step_size=1e-300"):
        check_step("step_size", 1e-300)
    assert check_step("step_size", 0.05) == 0.05


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30, "x", 1.0])
def test_a_seed_is_one_that_generators_take(seed):
    with pytest.raises(ValueError, match="seed must"):
        check_seed("seed", seed)


def test_every_seed_that_is_taken_seeds_generators():
    largest = check_seed("seed", 2**63 - 1)
    torch.Generator().manual_seed(largest + 1000)
    np.random.default_rng(largest)


def test_other_kinds_are_checked_too():
    for check, value in ((check_flag, "false"), (check_names, "abc"), (check_names, [1]), (check_patterns, 3)):
        with pytest.raises(ValueError, match="x must be"):
            check("x", value)
    with pytest.raises(ValueError, match="x is one of a, False, got \\['a'\\]"):
        check_choice("x", ["a"], ["a", False])
    assert check_choice("x", False, ["a", False]) is False


def test_a_value_is_shown_in_one_short_line():
    class Silent:
        def __repr__(self):
            raise RuntimeError

    assert shown(Silent()) == "a value of type Silent"
    assert shown(10**5000) == "a value of type int"
    assert len(shown("x" * 1000)) == 100
    assert "\n" not in shown(np.zeros((20, 20)))

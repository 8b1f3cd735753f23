import math

import torch
from torch import nn

from lightning_odem.stream import Stream


def make_module(value):
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def test_an_addition_leaves_the_stream_as_it_was():
    stream = Stream("average")
    stream.state = grown(stream, make_module(2.0), "digits")
    before, merged = stream.state, stream.state.merged["weight"].clone()
    after = grown(stream, make_module(4.0), "letters")
    assert stream.state is before
    assert torch.equal(before.merged["weight"], merged)
    assert before.report.tasks == ["digits"]
    assert after.report.tasks == ["digits", "letters"]
    assert after.merged["weight"].item() == 3.0


def grown(stream, module, task):
    """The state with one task more."""
    with stream.merging(module, task, 1.0, fingerprint=True) as addition:
        assert addition.record.task == task
        return addition.state(accuracy=[math.nan] * (len(stream.state.report.tasks) + 1))


def test_the_state_records_what_identifies_the_incoming_model():
    stream = Stream("average", exclude=("head",))
    module = nn.ModuleDict({"body": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    state = grown(stream, module, "digits")
    assert state.names["parameters"] == ["body.weight", "body.bias"]
    assert list(state.fingerprints) == ["digits"]
    assert set(state.task_parameters["digits"]) == {"head.weight", "head.bias"}


def test_excluded_frozen_parameters_that_do_not_change_stay_the_same_object():
    stream = Stream("average", exclude=("head",))
    module = nn.ModuleDict({"body": nn.Linear(1, 1), "head": nn.Linear(1, 1).requires_grad_(False)})
    stream.state = grown(stream, module, "digits")
    fixed = grown(stream, module, "letters").fixed
    assert set(fixed) == {"head.weight", "head.bias"}
    assert fixed is stream.state.fixed

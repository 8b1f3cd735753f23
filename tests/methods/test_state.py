"""The state of methods through failures, resets and checkpoints."""

import io

import pytest
import torch
from torch import nn

from lightning_odem.merging import merging
from lightning_odem.methods import METHODS, MergeMethod, MergeResult, OPCMMerge, resolve_method
from lightning_odem.snapshot import take_snapshot


class Momentum(MergeMethod):
    """Keeps a tensor, which it changes in place, as state_dict is allowed to hand it out."""

    def __init__(self):
        self.velocity = None
        self.merges = 0
        self.fails = False

    def start(self, incoming, context):
        self.velocity = torch.zeros_like(incoming)
        return MergeResult(incoming)

    def merge(self, merged, incoming, t, context):
        self.velocity.mul_(0.9).add_(incoming - merged)
        self.merges += 1
        if self.fails:
            raise RuntimeError("in the method")
        return MergeResult(merged.add_(self.velocity, alpha=t))

    def state_dict(self):
        return {} if self.velocity is None else {"velocity": self.velocity, "merges": self.merges}

    def load_state_dict(self, state):
        self.velocity, self.merges = state.get("velocity"), state.get("merges", 0)


def make_net(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 4)


def merge(method, seed, merged, base, fail_after=False):
    net = make_net(seed)
    settings = {"merged": merged, "base": take_snapshot(base), "calibration": None}
    with merging(net, method, task="new", t=1.0 if merged is None else 0.5, **settings):
        if fail_after:
            raise RuntimeError("in the block")
    return take_snapshot(net)


def merge_two(method, base):
    return merge(method, 2, merge(method, 1, None, base), base)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Momentum, OPCMMerge])
def test_a_failure_after_the_merge_leaves_the_method_as_it_was(kind):
    base = make_net(0)
    method, undisturbed = kind(), kind()
    merged = merge_two(method, base)
    with pytest.raises(RuntimeError, match="in the block"):
        merge(method, 3, merged, base, fail_after=True)
    merge_two(undisturbed, base)
    assert_same(method.state_dict(), undisturbed.state_dict())
    assert_same(merge(method, 4, merged, base), merge(undisturbed, 4, merged, base))


def test_a_failure_within_the_merge_leaves_the_method_as_it_was():
    base = make_net(0)
    method, undisturbed = Momentum(), Momentum()
    merged = merge_two(method, base)
    method.fails = True
    with pytest.raises(RuntimeError, match="in the method"):
        merge(method, 3, merged, base)
    merge_two(undisturbed, base)
    assert_same(method.state_dict(), undisturbed.state_dict())


def test_a_failure_in_the_first_task_leaves_a_method_without_state():
    method, base = Momentum(), make_net(0)
    with pytest.raises(RuntimeError, match="in the block"):
        merge(method, 1, None, base, fail_after=True)
    assert method.state_dict() == {}


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_state_takes_a_method_back_to_the_beginning(name):
    method = resolve_method(name)
    if method.needs <= {"base"}:
        merge_two(method, make_net(0))
    method.load_state_dict({})
    assert method.state_dict() == resolve_method(name).state_dict() == {}


def test_the_state_is_a_copy_that_later_merges_leave_alone():
    method, base = OPCMMerge(), make_net(0)
    merged = merge_two(method, base)
    state = method.state_dict()
    before = {"scale": state["scale"], "norms": list(state["norms"])}
    merge(method, 3, merged, base)
    assert state == before
    assert method.state_dict() != before


def test_the_state_goes_through_a_checkpoint_of_weights_only():
    method, base = OPCMMerge(), make_net(0)
    merge_two(method, base)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = OPCMMerge()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state_dict() == method.state_dict()

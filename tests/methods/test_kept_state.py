"""The state of methods through failures, resets and checkpoints."""

import io

import pytest
import torch
from torch import nn

from lightning_odem.methods import METHODS, MergeMethod, MergeResult, OPCMMerge, resolve_method
from lightning_odem.methods.kept_state import KeptState
from lightning_odem.methods.needs import BaseModel
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.merging import merging


class Momentum(MergeMethod):
    """Keeps a tensor and a list, the tensor replaced at each merge and the list longer."""

    def __init__(self):
        self.velocity = None
        self.merges = []
        self.fails = False

    def start(self, incoming, context):
        self.velocity = torch.zeros_like(incoming)
        return MergeResult(incoming)

    def merge(self, merged, incoming, t, context):
        self.velocity = 0.9 * self.velocity + (incoming - merged)
        self.merges.append(t)
        if self.fails:
            raise RuntimeError("in the method")
        return MergeResult(merged.add_(self.velocity, alpha=t))

    def state_dict(self):
        return {} if self.velocity is None else {"velocity": self.velocity, "merges": self.merges}

    def load_state_dict(self, state):
        self.velocity, self.merges = state.get("velocity"), state.get("merges", [])


class InPlace(Momentum):
    """The same, but the tensor that state_dict handed out is changed."""

    def merge(self, merged, incoming, t, context):
        self.velocity.mul_(0.9).add_(incoming - merged)
        return MergeResult(merged.add_(self.velocity, alpha=t))


class Copying(InPlace):
    """The same, but what is handed out or taken up is a copy."""

    def state_dict(self):
        return {"velocity": self.velocity.clone()} if self.velocity is not None else {}

    def load_state_dict(self, state):
        self.velocity = state["velocity"].clone() if state else None


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


def test_a_method_that_changes_its_state_in_place_is_refused():
    base = make_net(0)
    method = InPlace()
    merged = merge(method, 1, None, base)
    with pytest.raises(ValueError, match="changed 'velocity' of its state in place"):
        merge(method, 2, merged, base)


def test_a_method_that_hands_out_and_takes_up_copies_may_change_its_state_in_place():
    base = make_net(0)
    copying, replacing = Copying(), Momentum()
    merged = merge_two(copying, base)
    assert_same(merged, merge_two(replacing, base))
    with pytest.raises(RuntimeError, match="in the block"):
        merge(copying, 3, merged, base, fail_after=True)
    assert_same(merge(copying, 4, merged, base), merge(replacing, 4, merged, base))


def test_what_is_kept_of_a_method_are_its_own_tensors():
    method, base = Momentum(), make_net(0)
    merge_two(method, base)
    kept = KeptState(method)
    assert kept.value["velocity"] is method.velocity
    method.merges.append(0.25)
    kept.restore()
    assert method.merges == [0.5]


def test_a_failure_in_the_first_task_leaves_a_method_without_state():
    method, base = Momentum(), make_net(0)
    with pytest.raises(RuntimeError, match="in the block"):
        merge(method, 1, None, base, fail_after=True)
    assert method.state_dict() == {}


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_state_takes_a_method_back_to_the_beginning(name):
    method = resolve_method(name)
    if set(method.needs) <= {BaseModel()}:
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

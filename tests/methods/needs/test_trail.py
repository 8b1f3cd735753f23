import pytest
import torch

from lightning_odem.methods.needs.trail import Trail


def trail_of(steps, capacity):
    trail = Trail(capacity)
    for step in range(1, steps + 1):
        trail.see(step, lambda step=step: {"step": torch.tensor(step)})
    return [int(snapshot["step"]) for snapshot in trail.before(steps)]


@pytest.mark.parametrize("capacity", [2, 4, 7])
@pytest.mark.parametrize("steps", [2, 3, 8, 9, 50, 257])
def test_snapshots_are_evenly_spaced_and_as_many_as_fit(steps, capacity):
    kept = trail_of(steps, capacity)
    stride = kept[0]
    assert kept == [stride * (index + 1) for index in range(len(kept))]
    assert len(kept) <= capacity
    # One more place of half the stride would have been too many, but for the last step, which is the incoming model.
    assert stride == 1 or steps // (stride // 2) > capacity


def test_a_trail_goes_on_from_its_state():
    whole, first = Trail(4), Trail(4)
    for step in range(1, 31):
        whole.see(step, lambda step=step: {"step": torch.tensor(step)})
        if step == 13:
            first = Trail(4, first.state)
        first.see(step, lambda step=step: {"step": torch.tensor(step)})
    assert [s["step"] for s in whole.before(31)] == [s["step"] for s in first.before(31)]

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_odem.calibration.reduction import read_tail, tail, tail_length


def summed(losses, dtype, failed=(), reached=()):
    """The tails of processes with these losses, added in a dtype."""
    size = len(losses)
    tails = [tail(loss, rank, size, failed=rank in failed, reached=rank in reached) for rank, loss in enumerate(losses)]
    assert {len(entries) for entries in tails} == {tail_length(size)}
    return read_tail(torch.tensor(tails, dtype=dtype).sum(0).tolist())


@given(st.lists(st.floats(width=64), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_losses_are_added_exactly_whatever_dtype_they_travel_in(losses, dtype):
    try:
        expected = math.fsum(losses)
    except (OverflowError, ValueError):  # the sum is too large, or inf - inf
        return
    assert summed(losses, dtype)[0] == pytest.approx(expected, rel=0.0, abs=0.0, nan_ok=True)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_finite_number_stays_what_it_is(special):
    loss, *_ = summed([1.0, special], torch.float32)
    assert loss == pytest.approx(special, nan_ok=True)


@pytest.mark.parametrize(("failed", "reached"), [((), ()), ((1,), ()), ((), (0, 2)), ((0, 1, 2), (1,))])
def test_any_process_that_failed_or_has_a_gradient_shows(failed, reached):
    assert summed([0.0] * 3, torch.float32, failed, reached)[1:] == (bool(failed), bool(reached))

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_odem.calibration import CalibrationBuffer, MicroBatch
from lightning_odem.calibration.process_part import partition, read_tail, tail, tail_length


def make_batches(sizes, logits=False):
    """Micro-batches of consecutive numbers."""
    batches, first = [], 0
    for index, size in enumerate(sizes):
        numbers = torch.arange(first, first + size)
        stored = numbers[:, None] + torch.zeros(2) if logits else None
        batches.append(MicroBatch((numbers, -numbers), f"task {index}", (index + 1) / 7, False, stored))
        first += size
    return batches


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 7))
def test_every_sample_is_taken_once_in_order_and_no_process_has_two_more_than_another(sizes, processes):
    batches = make_batches(sizes)
    parts = [partition(batches, rank, processes) for rank in range(processes)]
    taken = [[number for piece in pieces for number in piece.batch.samples[0].tolist()] for pieces in parts]
    assert sum(taken, []) == list(range(sum(sizes)))
    lengths = list(map(len, taken))
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7))
def test_the_parts_of_a_micro_batch_share_its_weight_by_their_samples(sizes, processes):
    batches = make_batches(sizes)
    pieces = [piece for rank in range(processes) for piece in partition(batches, rank, processes)]
    for source, batch in enumerate(batches):
        own = [piece for piece in pieces if piece.source == source]
        assert [piece.part for piece in own] == [len(piece.batch.samples[0]) / sizes[source] for piece in own]
        assert all(piece.batch.share == batch.share * piece.part for piece in own)
        assert all(piece.batch.task == batch.task for piece in own)
        assert math.fsum(piece.part for piece in own) == pytest.approx(1.0, rel=1e-15)


def test_logits_are_cut_with_their_samples_and_nothing_is_copied():
    batches = make_batches([5], logits=True)
    (piece,) = partition(batches, 1, 2)
    assert piece.batch.logits[:, 0].tolist() == piece.batch.samples[0].tolist() == [2, 3, 4]
    for cut, whole in ((piece.batch.samples[0], batches[0].samples[0]), (piece.batch.logits, batches[0].logits)):
        assert cut.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_whole_micro_batches_are_handed_on_with_their_own_share():
    buffer = CalibrationBuffer(12)
    buffer.add("digits", (torch.zeros(12, 2), torch.arange(12)))
    batches = list(buffer.micro_batches(3))
    pieces = partition(batches, 1, 2)
    assert [(piece.source, piece.part, piece.batch.share) for piece in pieces] == [(2, 1.0, 0.25), (3, 1.0, 0.25)]


def test_without_samples_for_all_the_others_have_none():
    assert [len(partition(make_batches([2]), rank, 3)) for rank in range(3)] == [0, 1, 1]
    assert partition([], 0, 3) == []


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

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from lightning_odem.calibration.containers import CannotBeKeptError
from lightning_odem.calibration.padding import Padding, find_padding, trim

SAMPLES = [torch.arange(1, 2 + length)[None] for length in (2, 0, 3)]


def padded(value, at_start=False):
    return torch.cat(Padding(value, at_start).fill(SAMPLES))


@pytest.mark.parametrize("at_start", [False, True])
def test_the_padding_between_samples_and_their_batch_is_read_off(at_start):
    batch = padded(7, at_start)
    assert batch.shape == (3, 4)
    assert Padding.between(batch, SAMPLES, is_random=False) == Padding(7, at_start)


def test_values_of_samples_that_are_random_are_not_compared():
    batch = padded(7).masked_fill(padded(7) == 2, 99)
    assert Padding.between(batch, SAMPLES, is_random=True) == Padding(7)
    with pytest.raises(CannotBeKeptError, match="not padded with one value"):
        Padding.between(batch, SAMPLES, is_random=False)


def test_a_batch_larger_than_its_largest_sample_is_no_padding_of_it():
    batch = torch.cat([padded(7), torch.full((3, 1), 7)], dim=1)
    with pytest.raises(CannotBeKeptError, match="to the largest of them"):
        Padding.between(batch, SAMPLES, is_random=False)


@pytest.mark.parametrize("at_start", [False, True])
def test_samples_of_two_dimensions_are_filled_in_both(at_start):
    tall, wide = Padding(0, at_start).fill([torch.ones(1, 3, 1), torch.ones(1, 1, 2)])
    assert tall.shape == wide.shape == (1, 3, 2)
    corner = (0, -1, -1) if at_start else (0, 0, 0)
    assert tall[corner] == wide[corner] == 1.0
    assert (tall.sum(), wide.sum()) == (3.0, 2.0)


def test_padding_is_found_in_batches_of_different_lengths():
    texts = [torch.arange(1, 2 + length) for length in (2, 0, 3, 1, 4)]
    ids = [row for part in (texts[:3], texts[3:]) for row in pad_sequence(part, batch_first=True).split(1)]
    masks = [row > 0 for row in ids]
    assert find_padding([ids, masks]) == [Padding(0, trim=True), Padding(False, trim=True)]


def test_a_value_that_all_samples_end_with_is_no_padding():
    assert find_padding([[torch.tensor([[1, 2, 2]]), torch.tensor([[3, 2, 2, 2]])]]) is None


@pytest.mark.parametrize(("at_start", "row"), [(False, [5, 0]), (True, [5, 0, 0])])
def test_padding_that_no_sample_of_a_batch_needs_is_cut_off(at_start, row):
    plain = torch.ones(2)
    ids = torch.tensor([[5, 0, 0], [5, 6, 0]])
    trimmed, same = trim([ids, plain], [Padding(0, at_start, trim=True), None])
    assert trimmed[0].tolist() == row
    assert same is plain
    assert trim([ids], [Padding(0, at_start)])[0] is ids

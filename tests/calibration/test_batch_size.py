import pytest
import torch

from lightning_odem.calibration.batch_size import candidate_sizes, is_counted_by_lists, plain_size
from lightning_odem.calibration.containers import take_apart

RECORDS = [{"a": 1}, {"a": 2}]


def test_only_tensors_in_plain_containers_have_a_plain_size():
    assert plain_size((torch.zeros(3), {"y": torch.zeros(3, 2)})) == 3
    assert plain_size((torch.zeros(3), torch.zeros(2))) is None
    assert plain_size((torch.zeros(3), ["a", "b", "c"])) is None


@pytest.mark.parametrize(
    ("batch", "batch_size", "expected"),
    [
        ((torch.zeros(3), torch.zeros(3), torch.zeros(4)), None, [(3, False), (4, False)]),
        ((torch.zeros(3), torch.zeros(3), torch.zeros(4)), 4, [(4, False), (3, False)]),
        ((torch.zeros(3), torch.zeros(3)), 5, [(3, False), (2, False)]),
        ((torch.zeros(3), RECORDS), 3, [(2, True), (3, False)]),
    ],
)
def test_the_likeliest_size_comes_first(batch, batch_size, expected):
    assert candidate_sizes(take_apart(batch), batch_size) == expected


@pytest.mark.parametrize(
    ("batch", "batch_size", "expected"),
    [
        ((torch.zeros(3), torch.zeros(3)), None, False),
        ((torch.zeros(3), [torch.zeros(3), torch.zeros(3)]), 2, True),
        ((torch.zeros(3), [torch.zeros(3), torch.zeros(3)]), 3, False),
        ([torch.zeros(3), torch.zeros(3)], 2, False),
        ([{"x": torch.zeros(3)}, {"x": torch.zeros(3)}], None, True),
    ],
)
def test_lists_count_samples_if_they_hold_records_or_are_as_long_as_a_batch(batch, batch_size, expected):
    assert is_counted_by_lists(batch, batch_size, 3) == expected

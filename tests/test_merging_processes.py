import pytest
import sharded
import torch
from job import run_job

FP64 = torch.float64


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dtype"), [(2, FP64), (3, FP64), (3, torch.float32)])
def test_several_processes_merge_as_one_does_with_one_all_reduce_per_evaluation(size, dtype):
    alone = sharded.merge(dtype)
    first, *others = run_job(sharded.merge, size, dtype)
    # Rounding is carried on through some dozens of steps.
    tolerance = 1e-12 if dtype == FP64 else 1e-5
    for name, (weights, losses, evaluations, all_reduces) in first.items():
        expected, expected_losses, expected_evaluations, _ = alone[name]
        assert (weights - expected).norm() <= tolerance * expected.norm(), name
        assert losses == pytest.approx(expected_losses, rel=tolerance, abs=tolerance, nan_ok=True), name
        assert all_reduces == evaluations == expected_evaluations > 0, name
        for other in others:
            assert torch.equal(other[name][0], weights), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank", "kind", "message"),
    [
        ("loss", 1, "NonFiniteLossError", "Merging task 'new': a weight is nan at step 3 (t = 0.2) of the path"),
        ("step", 0, "OSError", "[Errno 28] No space left on device"),
        ("method", 1, "Rare", "before the first evaluation at 0"),
        ("after", 1, "KeyError", "'accuracy'"),
    ],
)
def test_an_error_in_one_process_ends_the_merge_of_all_and_leaves_their_modules_as_they_were(
    where, rank, kind, message
):
    for error, same, seconds in run_job(sharded.merge_and_fail, 3, where):
        assert error.kind == kind
        assert error.message.startswith(message)
        assert same
        assert seconds < 10.0

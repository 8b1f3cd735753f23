import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nan, tensor
from torch.testing import assert_close

from lightning_odem.metrics import backward_transfer, check_weights, forgetting, forward_transfer, weighted_accuracy

# Rows are merges. BWT per earlier task: -0.3, +0.1; forgetting per earlier task: 0.9 - 0.4 = 0.5, 0.7 - 0.8 = -0.1.
MATRIX = tensor([[0.7, nan, nan], [0.9, 0.7, nan], [0.4, 0.8, 0.6]], dtype=torch.float64)
WEIGHTS = tensor([2.0, 1.0, 5.0], dtype=torch.float64)

fractions = st.floats(0, 1)
weight = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


@st.composite
def streams(draw, min_tasks=1):
    """A full [K, K] matrix of accuracies and K weights; the last one is positive."""
    size = draw(st.integers(min_tasks, 6))
    matrix = draw(st.lists(fractions, min_size=size * size, max_size=size * size))
    weights = draw(st.lists(weight, min_size=size - 1, max_size=size - 1)) + [draw(st.floats(1e-6, 1e6))]
    return tensor(matrix, dtype=torch.float64).view(size, size), tensor(weights, dtype=torch.float64)


def loop_mean(values, weights):
    total = mean = 0.0
    for value, weight in zip(values, weights, strict=True):
        if weight > 0:
            mean += weight * value
            total += weight
    return mean / total if total else nan


def loop_acc(matrix, weights):
    return loop_mean(matrix[-1], weights)


def loop_bwt(matrix, weights):
    last = len(matrix) - 1
    return loop_mean([matrix[last][i] - matrix[i][i] for i in range(last)], weights[:last])


def loop_forgetting(matrix, weights):
    last = len(matrix) - 1
    drops = [max(matrix[merge][j] for merge in range(j, last)) - matrix[last][j] for j in range(last)]
    return loop_mean(drops, weights[:last])


def loop_fwt(before_training, baseline, weights):
    return loop_mean([a - b for a, b in zip(before_training[1:], baseline[1:], strict=True)], weights[1:])


def acc_of_last_merge(matrix, weights):
    return weighted_accuracy(matrix[-1], weights)


def fwt_of_first_rows(matrix, weights):
    return forward_transfer(matrix[0], matrix[-1], weights)


ALL = [acc_of_last_merge, backward_transfer, forgetting, fwt_of_first_rows]


def test_acc_of_hand_worked_example():
    assert_close(weighted_accuracy(MATRIX[-1], WEIGHTS).item(), (2 * 0.4 + 0.8 + 5 * 0.6) / 8)


def test_bwt_of_hand_worked_example():
    assert_close(backward_transfer(MATRIX, WEIGHTS).item(), (2 * -0.3 + 0.1) / 3)


def test_forgetting_of_hand_worked_example():
    assert_close(forgetting(MATRIX, WEIGHTS).item(), (2 * 0.5 - 0.1) / 3)


def test_fwt_of_hand_worked_example():
    before_training, baseline = tensor([nan, 0.5, 0.3]), tensor([nan, 0.1, 0.4])
    assert_close(forward_transfer(before_training, baseline, WEIGHTS), tensor((0.4 + 5 * -0.1) / 6))


@settings(deadline=None)
@given(streams())
def test_metrics_equal_explicit_loops(stream):
    matrix, weights = stream
    rows, plain = matrix.tolist(), weights.tolist()
    expected = [loop(rows, plain) for loop in (loop_acc, loop_bwt, loop_forgetting)]
    expected.append(loop_fwt(rows[0], rows[-1], plain))
    actual = [metric(matrix, weights).item() for metric in ALL]
    assert actual == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(deadline=None)
@given(st.lists(fractions, min_size=1, max_size=8), st.floats(1e-300, 1e300))
def test_acc_with_equal_weights_is_the_mean(accuracies, weight):
    accuracies = tensor(accuracies, dtype=torch.float64)
    assert_close(weighted_accuracy(accuracies, torch.full_like(accuracies, weight)), accuracies.mean())


@settings(deadline=None)
@given(streams(), st.floats(1e-250, 1e250))
def test_metrics_do_not_change_when_all_weights_are_scaled(stream, factor):
    matrix, weights = stream
    for metric in ALL:
        assert_close(metric(matrix, factor * weights), metric(matrix, weights), equal_nan=True)


def test_sum_of_weights_may_exceed_the_largest_float():
    assert weighted_accuracy(tensor([0.5, 1.0]), tensor([1.5e308, 1.5e308], dtype=torch.float64)) == 0.75


@settings(deadline=None)
@given(st.lists(fractions, min_size=2, max_size=6))
def test_bwt_and_forgetting_of_constant_columns_are_zero(accuracies):
    matrix = tensor(accuracies, dtype=torch.float64).repeat(len(accuracies), 1)
    weights = torch.arange(1.0, len(accuracies) + 1)
    assert backward_transfer(matrix, weights) == 0
    assert forgetting(matrix, weights) == 0


@settings(deadline=None)
@given(streams(min_tasks=2))
def test_forgetting_is_at_least_minus_bwt(stream):
    matrix, weights = stream
    if weights[:-1].any():
        assert forgetting(matrix, weights) >= -backward_transfer(matrix, weights) - 1e-12


@settings(deadline=None)
@given(streams())
def test_entries_above_the_diagonal_are_ignored(stream):
    matrix, weights = stream
    lower = matrix.masked_fill(torch.ones_like(matrix, dtype=torch.bool).triu(1), nan)
    for metric in (backward_transfer, forgetting):
        assert_close(metric(lower, weights), metric(matrix, weights), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("metric", [backward_transfer, forgetting, fwt_of_first_rows])
def test_metric_is_nan_before_the_second_task(metric):
    assert metric(tensor([[0.9]]), tensor([1.0])).isnan()


@pytest.mark.parametrize("metric", [backward_transfer, forgetting])
def test_metric_is_nan_while_all_earlier_tasks_have_weight_zero(metric):
    assert metric(MATRIX, tensor([0.0, 0.0, 1.0])).isnan()


def test_fwt_is_nan_if_only_the_first_task_has_weight():
    assert forward_transfer(tensor([0.1, 0.2]), tensor([0.1, 0.1]), tensor([1.0, 0.0])).isnan()


@pytest.mark.parametrize("metric", ALL)
def test_missing_accuracy_of_a_task_with_weight_makes_the_metric_nan(metric):
    matrix = tensor([[0.7, 0.5, 0.5], [0.9, 0.7, 0.5], [0.4, nan, 0.6]])
    assert metric(matrix, tensor([1.0, 1.0, 1.0])).isnan()


@pytest.mark.parametrize("metric", ALL)
def test_missing_accuracy_of_a_task_without_weight_does_not_enter(metric):
    matrix = tensor([[0.7, 0.5, 0.5], [0.9, 0.7, 0.5], [0.4, nan, 0.6]])
    weights = tensor([1.0, 0.0, 1.0])
    assert_close(metric(matrix, weights), metric(matrix.nan_to_num(0.123), weights))
    assert not metric(matrix, weights).isnan()


def test_forgetting_is_nan_if_an_earlier_merge_was_not_measured():
    matrix = MATRIX.clone()
    matrix[1, 0] = nan
    assert forgetting(matrix, WEIGHTS).isnan()
    assert not backward_transfer(matrix, WEIGHTS).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ALL)
def test_result_is_a_scalar_of_the_accuracies_dtype(metric, dtype):
    matrix = MATRIX.nan_to_num(0.25)
    result = metric(matrix.to(dtype), WEIGHTS)
    assert result.shape == ()
    assert result.dtype == dtype
    assert_close(result.double(), metric(matrix.to(dtype).double(), WEIGHTS), rtol=torch.finfo(dtype).eps, atol=1e-12)


def test_acc_gradient_is_the_share_of_each_task_even_beside_a_missing_accuracy():
    accuracies = tensor([0.5, nan, 0.7], requires_grad=True)
    weighted_accuracy(accuracies, tensor([1.0, 0.0, 3.0])).backward()
    assert_close(accuracies.grad, tensor([0.25, 0.0, 0.75]))


def test_functions_leave_their_input_unchanged():
    matrix, weights = MATRIX.clone(), WEIGHTS.clone()
    for metric in ALL:
        metric(matrix, weights)
    assert_close(matrix, MATRIX, equal_nan=True, rtol=0, atol=0)
    assert_close(weights, WEIGHTS, rtol=0, atol=0)


@pytest.mark.parametrize("value", [-1.0, -math.inf, math.inf, nan])
@pytest.mark.parametrize("metric", ALL)
def test_invalid_weight_is_named_with_its_index(metric, value):
    with pytest.raises(ValueError, match=rf"weight {value} at index 1 is invalid"):
        metric(MATRIX, tensor([1.0, value, 1.0]))


@pytest.mark.parametrize("metric", ALL)
def test_weights_that_are_all_zero_raise(metric):
    with pytest.raises(ValueError, match="At least one utility weight must be positive"):
        metric(MATRIX, torch.zeros(3))


@pytest.mark.parametrize("metric", ALL)
def test_weights_of_another_length_raise(metric):
    with pytest.raises(ValueError, match="for 2 utility weights, got torch.float64 of shape"):
        metric(MATRIX, torch.ones(2))


@pytest.mark.parametrize("metric", [backward_transfer, forgetting])
def test_matrix_that_is_not_square_raises(metric):
    with pytest.raises(ValueError, match=r"`matrix` .* shape \(3, 3\) .* shape \(2, 3\)"):
        metric(MATRIX[:2], torch.ones(3))


def test_fwt_names_the_argument_of_the_wrong_shape():
    with pytest.raises(ValueError, match="`baseline`"):
        forward_transfer(torch.ones(3), torch.ones(2), torch.ones(3))


def test_integer_accuracies_raise():
    with pytest.raises(ValueError, match="floating point tensor .* got torch.int64"):
        weighted_accuracy(tensor([1, 0]), torch.ones(2))


@pytest.mark.parametrize("weights", [[1.0, 0.0], (1, 2), tensor([0.0, 0.5]), [5e-324]])
def test_check_weights_accepts_sequences_and_tensors(weights):
    assert check_weights(weights) is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 1.0, -0.5], "weight -0.5 at index 2"),
        (tensor([nan, 1.0]), "weight nan at index 0"),
        ([], "At least one"),
        ([0, 0], r"At least one .* got \[0.0, 0.0\]"),
        (1.0, r"1-dimensional, one per task, got shape \(\)"),
        ([[1.0, 2.0]], r"1-dimensional, one per task, got shape \(1, 2\)"),
    ],
)
def test_check_weights_says_what_is_wrong(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights)


def test_where_lower_is_better_transfer_is_that_of_the_scores_with_their_sign_changed():
    matrix, weights = torch.tensor([[2.0, nan], [5.0, 1.0]]), torch.tensor([3.0, 1.0])
    assert backward_transfer(matrix, weights, higher_is_better=False) == -3.0
    assert forgetting(matrix, weights, higher_is_better=False) == 3.0
    before, base = torch.tensor([nan, 2.0]), torch.tensor([nan, 6.0])
    assert forward_transfer(before, base, weights, higher_is_better=False) == 4.0

import multiprocessing
import pickle
import sys

import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nan, tensor
from torch.testing import assert_close

from lightning_odem.metrics import AccuracyMatrix

TARGET = tensor([0, 1, 2, 3])
# Right answers out of 4, per (merge, task).
RIGHT = {(0, 0): 3, (1, 0): 2, (1, 1): 4, (2, 0): 1, (2, 1): 2, (2, 2): 0}
EXPECTED = tensor([[0.75, nan, nan], [0.5, 1.0, nan], [0.25, 0.5, 0.0]], dtype=torch.float64)

batches = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)).filter(lambda batch: batch[1] <= batch[0]),
    max_size=12,
)


@pytest.fixture(autouse=True)
def agg():
    with plt.rc_context():
        plt.switch_backend("agg")
        yield
        plt.close("all")


def preds(right):
    """Class ids for TARGET of which the first ``right`` are right."""
    return torch.where(torch.arange(4) < right, TARGET, TARGET + 1)


def feed(metric, cells):
    for (merge, task), right in cells.items():
        metric.update(preds(right), TARGET, merge=merge, task=task)
    return metric


def assert_equal(actual, expected):
    assert_close(actual, expected, equal_nan=True, rtol=0, atol=0)


def test_matrix_holds_the_accuracy_of_every_task_after_every_merge():
    assert_equal(feed(AccuracyMatrix(), RIGHT).compute(), EXPECTED)


@settings(deadline=None)
@given(batches)
def test_matrix_equals_pooled_counts_whatever_the_order_of_batches(cells):
    metric = AccuracyMatrix()
    for merge, task, right in cells:
        metric.update(preds(right), TARGET, merge=merge, task=task)
    assert metric.total.sum() == 4 * len(cells)
    for merge, row in enumerate(metric.compute().tolist() if cells else []):
        for task, accuracy in enumerate(row):
            counts = [right for k, i, right in cells if (k, i) == (merge, task)]
            expected = sum(counts) / (4 * len(counts)) if counts else nan
            assert accuracy == pytest.approx(expected, nan_ok=True)


def test_matrix_is_square_when_only_the_first_task_was_measured():
    matrix = feed(AccuracyMatrix(), {(2, 0): 4}).compute()
    assert_equal(matrix, tensor([[nan, nan, nan], [nan, nan, nan], [1.0, nan, nan]], dtype=torch.float64))


def test_matrix_of_the_first_merge_keeps_its_two_dimensions():
    metric = feed(AccuracyMatrix(), {(0, 0): 3})
    assert_equal(metric.compute(), tensor([[0.75]], dtype=torch.float64))
    assert_equal(pickle.loads(pickle.dumps(metric)).compute(), tensor([[0.75]], dtype=torch.float64))


def test_matrix_is_empty_before_the_first_update():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert AccuracyMatrix().compute().shape == (0, 0)


def test_empty_batch_leaves_the_cell_nan():
    metric = AccuracyMatrix()
    metric.update(torch.empty(0, 10), torch.empty(0, dtype=torch.int64), merge=0, task=0)
    assert metric.compute().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_count_like_the_class_ids_of_their_maximum(dtype):
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.arange(50) % 7
    by_scores, by_ids = AccuracyMatrix(), AccuracyMatrix()
    by_scores.update(scores, target, merge=0, task=0)
    by_ids.update(scores.max(dim=1).indices, target, merge=0, task=0)
    assert 0 < by_scores.correct.item() < 50
    assert_equal(by_scores.compute(), by_ids.compute())


def test_masked_scores_of_minus_infinity_are_allowed():
    metric = AccuracyMatrix()
    metric.update(tensor([[-torch.inf, 0.1, -torch.inf]]), tensor([1]), merge=0, task=0)
    assert metric.compute() == 1


def test_forward_returns_the_batch_and_accumulates():
    metric = AccuracyMatrix()
    assert_equal(metric(preds(4), TARGET, merge=1, task=0)[1, 0].item(), 1.0)
    assert_equal(metric(preds(2), TARGET, merge=1, task=0)[1, 0].item(), 0.5)
    assert_equal(metric(preds(3), TARGET, merge=0, task=0), tensor([[0.75]], dtype=torch.float64))
    assert_equal(metric.compute(), tensor([[0.75, nan], [0.75, nan]], dtype=torch.float64))


def test_update_after_inference_mode_continues_the_counts():
    metric = AccuracyMatrix()
    with torch.inference_mode():
        metric.update(preds(4), TARGET, merge=0, task=0)
    metric.update(preds(2), TARGET, merge=0, task=0)
    assert metric.compute().item() == 0.75


@pytest.mark.parametrize("swap", [False, True])
def test_merge_state_adds_copies_that_saw_different_tasks(swap):
    first = feed(AccuracyMatrix(), {(0, 0): 3, (1, 0): 4})
    second = feed(AccuracyMatrix(), {(1, 0): 0, (1, 1): 4, (2, 0): 1, (2, 1): 2, (2, 2): 0})
    if swap:
        first, second = second, first
    first.merge_state(second)
    assert_equal(first.compute(), EXPECTED)


def test_merge_state_with_an_empty_copy_changes_nothing():
    metric = feed(AccuracyMatrix(), RIGHT)
    metric.merge_state(AccuracyMatrix())
    assert_equal(metric.compute(), EXPECTED)


def test_compute_adds_ranks_that_saw_different_tasks_and_keeps_the_local_counts():
    other = feed(AccuracyMatrix(), {(1, 1): 4, (2, 0): 1, (2, 1): 2, (2, 2): 0})
    states = iter([other.correct, other.total])
    metric = AccuracyMatrix(
        distributed_available_fn=lambda: True, dist_sync_fn=lambda counts, group: [counts, next(states)]
    )
    feed(metric, {(0, 0): 3, (1, 0): 2})
    assert_equal(metric.compute(), EXPECTED)
    assert metric.total.shape == (2, 2)


def matrix_of_rank(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    metric = AccuracyMatrix()
    if rank == 1:
        feed(metric, {(1, 0): 2, (1, 1): 4})
    matrix = metric.compute().tolist()
    dist.destroy_process_group()
    return matrix


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that use threads")
def test_two_processes_compute_one_matrix_when_only_one_has_samples(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        ranks = [(rank, tmp_path / "rendezvous") for rank in range(2)]
        matrices = pool.starmap_async(matrix_of_rank, ranks, chunksize=1).get(timeout=60)
    for matrix in matrices:
        assert_equal(tensor(matrix), tensor([[nan, nan], [0.5, 1.0]]))


def test_reset_forgets_the_stream():
    metric = feed(AccuracyMatrix(), RIGHT)
    metric.reset()
    assert metric.total.shape == (0, 0)
    assert_equal(feed(metric, {(0, 0): 1}).compute(), tensor([[0.25]], dtype=torch.float64))


def test_pickled_copy_continues_the_stream():
    metric = feed(AccuracyMatrix(), {cell: right for cell, right in RIGHT.items() if cell[0] < 2})
    copy = pickle.loads(pickle.dumps(metric))
    feed(copy, {cell: right for cell, right in RIGHT.items() if cell[0] == 2})
    assert_equal(copy.compute(), EXPECTED)
    assert_equal(metric.compute(), EXPECTED[:2, :2])


def test_state_dict_is_empty_unless_persistent():
    assert not feed(AccuracyMatrix(), RIGHT).state_dict()


def test_persistent_state_dict_restores_the_counts_into_a_new_metric(tmp_path):
    metric = feed(AccuracyMatrix(), RIGHT)
    metric.persistent(True)
    torch.save(metric.state_dict(), tmp_path / "metric.pt")
    restored = AccuracyMatrix()
    restored.persistent(True)
    restored.load_state_dict(torch.load(tmp_path / "metric.pt", weights_only=True))
    restored.update(preds(3), TARGET, merge=2, task=2)
    assert restored.compute()[2, 2] == 3 / 8


@pytest.mark.parametrize(("merge", "task"), [(0, 1), (1, -1), (-1, -1), (-1, 0)])
def test_task_that_was_not_merged_yet_raises(merge, task):
    with pytest.raises(ValueError, match=f"got task {task} after merge {merge}"):
        AccuracyMatrix().update(preds(4), TARGET, merge=merge, task=task)


@pytest.mark.parametrize(
    ("bad_preds", "target", "message"),
    [
        (torch.zeros(3, 5), TARGET, r"for 4 targets, got shape \(3, 5\)"),
        (torch.zeros(3, dtype=torch.int64), TARGET, r"for 4 targets, got shape \(3,\)"),
        (torch.zeros(4, 5, 2), TARGET, r"got shape \(4, 5, 2\)"),
        (torch.zeros(4, 1), TARGET, r"2 or more classes.* got shape \(4, 1\)"),
        (torch.zeros(()), TARGET, r"got shape \(\)"),
        (torch.zeros(4), TARGET, r"must be integer class ids, got torch.float32"),
        (tensor([[0.0, 1.0], [0.0, nan], [1.0, 0.0], [nan, nan]]), TARGET, "NaN scores for 2 of 4 .* first at index 1"),
        (torch.zeros(4, 5), TARGET.float(), r"integer `target` of shape \[B\], got torch.float32"),
        (torch.zeros(4, 5), TARGET.bool(), "got torch.bool"),
        (torch.zeros(4, 5), TARGET.view(4, 1), r"of shape \(4, 1\)"),
    ],
)
def test_bad_input_is_described_and_not_counted(bad_preds, target, message):
    metric = feed(AccuracyMatrix(), {(0, 0): 3})
    with pytest.raises(ValueError, match=message):
        metric.update(bad_preds, target, merge=1, task=0)
    assert_equal(metric.compute(), tensor([[0.75]], dtype=torch.float64))


def test_plot_is_a_heat_map_with_the_measured_percentages():
    fig, ax = feed(AccuracyMatrix(), RIGHT).plot()
    fig.canvas.draw()
    assert isinstance(fig, plt.Figure)
    assert [text.get_text() for text in ax.texts] == ["75.0", "50.0", "100.0", "25.0", "50.0", "0.0"]
    assert [text.get_position() for text in ax.texts] == [(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)]
    assert_close(tensor(ax.images[0].get_array().filled(nan)), 100 * EXPECTED, equal_nan=True)


def test_plot_draws_a_given_matrix_into_given_axes():
    fig, axes = plt.subplots(1, 2)
    drawn_fig, drawn = AccuracyMatrix().plot(EXPECTED[:2, :2], ax=axes[1])
    assert drawn_fig is fig
    assert drawn is axes[1]
    assert len(axes[1].texts) == 3
    assert not axes[0].texts

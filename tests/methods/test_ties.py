import pytest
import torch
from vectors import make_models, merge_stream

from lightning_odem.methods import AverageMerge, TiesMerge
from lightning_odem.methods.ties import disjoint_merge, elect_sign, ties, trim

WEIGHTS = [1.0, 0.5, 2.0, 3.0]


def ties_in_loops(vectors, density, combine):
    """The operator entry by entry, on lists of numbers."""
    size = len(vectors[0])
    kept = max(round(density * size), 1)
    rows = []
    for vector in vectors:
        values = vector.tolist()
        largest = sorted(range(size), key=lambda entry: -abs(values[entry]))[:kept]
        rows.append([value if entry in largest else 0.0 for entry, value in enumerate(values)])
    sums = [sum(column) for column in zip(*rows, strict=True)]
    signs = [(total > 0) - (total < 0) for total in sums]
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    result = []
    for column, sign in zip(zip(*rows, strict=True), signs, strict=True):
        agreeing = [value for value in column if value * (sign or majority) > 0]
        result.append(sum(agreeing) / (len(agreeing) or 1) if combine == "mean" else sum(agreeing))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize(("density", "kept"), [(0.2, 2), (0.25, 2), (1.0, 10), (0.001, 1)])
def test_trimming_keeps_the_largest_entries(density, kept):
    vector = torch.randn(10, generator=torch.Generator().manual_seed(0))
    trimmed = trim(vector, density)
    largest = vector.abs().topk(kept).indices
    assert torch.equal(trimmed[largest], vector[largest])
    assert trimmed.count_nonzero() == kept


def test_trimming_a_sparse_vector_keeps_what_there_is():
    vector = torch.tensor([0.0, 0.0, -1.0, 0.0])
    assert torch.equal(trim(vector, 0.75), vector)


def test_scaling_a_vector_does_not_change_what_survives():
    base, (model, *_) = make_models(1)
    torch.testing.assert_close(trim(0.01 * (model - base), 0.2), 0.01 * trim(model - base, 0.2))


def test_entries_that_cancel_take_the_majority_sign():
    first, second = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, -1.0])
    sign = elect_sign([first, second])
    assert sign.tolist() == [-1, -1, -1]
    assert disjoint_merge([first, second], sign).tolist() == [-1, -2, -2]
    assert elect_sign([first, -first]).tolist() == [0, 0, 0]


def test_only_entries_of_the_elected_sign_are_merged():
    vectors = [torch.tensor([3.0, -1.0, 0.0]), torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 5.0, 0.0])]
    sign = elect_sign(vectors)
    assert disjoint_merge(vectors, sign).tolist() == [4.0, 5.0, 0.0]
    assert disjoint_merge(vectors, sign, "mean").tolist() == [2.0, 5.0, 0.0]


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_operator_is_that_written_in_loops(number, combine):
    base, models = make_models(number, seed=3)
    vectors = [model - base for model in models]
    torch.testing.assert_close(ties(vectors, 0.3, combine), ties_in_loops(vectors, 0.3, combine))


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_the_utility_recursion_replaces_the_update(combine):
    base, models = make_models(4)
    merged = merge_stream(TiesMerge(0.7, 0.4, combine), base, models, WEIGHTS)
    assert torch.equal(merged[0], models[0])
    for k in range(1, 4):
        ratio = WEIGHTS[k] / sum(WEIGHTS[: k + 1])
        candidates = [(1 - ratio) * (merged[k - 1] - base), ratio * (models[k] - base)]
        torch.testing.assert_close(merged[k], base + 0.7 * ties_in_loops(candidates, 0.4, combine))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_sum_adds_to_the_update(weights):
    base, models = make_models(4)
    merged = merge_stream(TiesMerge(0.3, recursion="sum"), base, models, weights)
    torch.testing.assert_close(merged[0], base + 0.3 * (models[0] - base))
    for k in range(1, 4):
        added = ties_in_loops([merged[k - 1] - base, models[k] - base], 0.2, "sum")
        torch.testing.assert_close(merged[k], merged[k - 1] + 0.3 * added)


def test_without_trimming_and_conflicts_the_utility_recursion_is_the_running_average():
    base, models = make_models(4)
    models = [base + (model - base).abs() for model in models]
    merged = merge_stream(TiesMerge(scale=1.0, density=1.0), base, models, WEIGHTS)
    torch.testing.assert_close(merged, merge_stream(AverageMerge(), base, models, WEIGHTS))


def test_the_order_of_two_tasks_of_equal_weight_does_not_matter():
    base, models = make_models(2)
    forth, back = (merge_stream(TiesMerge(), base, order)[-1] for order in (models, models[::-1]))
    torch.testing.assert_close(forth, back)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, "scale=-1.0"),
        ({"density": 0.0}, r"density must lie in \(0, 1\], got density=0.0"),
        ({"density": 20}, "density=20"),
        ({"combine": "max"}, "combine is one of sum, mean, got 'max'"),
        ({"recursion": "add"}, "recursion is one of utility, sum, got 'add'"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TiesMerge(**settings)

from itertools import permutations

import pytest
import torch
from vectors import make_context, make_models, merge_stream

from lightning_odem.methods import AverageMerge, TaskArithmeticMerge

WEIGHTS = [1.0, 0.5, 2.0, 3.0]


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.4])
def test_the_utility_recursion_scales_the_weighted_mean_of_task_vectors(scale):
    base, models = make_models(4)
    merged = merge_stream(TaskArithmeticMerge(scale), base, models, WEIGHTS)
    mean = torch.zeros_like(base)
    for k, (model, weight) in enumerate(zip(models, WEIGHTS, strict=True)):
        # Eq. 48 with the accumulated vector kept.
        ratio = weight / sum(WEIGHTS[: k + 1])
        mean = (1 - ratio) * mean + ratio * (model - base)
        torch.testing.assert_close(merged[k], base + scale * mean)
    shares = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
    torch.testing.assert_close(merged[-1], base + scale * (shares @ (torch.stack(models) - base)))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_scale_1_is_the_running_average(weights):
    base, models = make_models(4)
    merged = merge_stream(TaskArithmeticMerge(1.0), base, models, weights)
    average = merge_stream(AverageMerge(), base, models, weights)
    torch.testing.assert_close(merged, average)
    assert torch.equal(merged[0], models[0])


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_sum_adds_every_task_vector_with_the_same_scale(weights):
    base, models = make_models(4)
    merged = merge_stream(TaskArithmeticMerge(0.1, "sum"), base, models, weights)
    for k in range(4):
        torch.testing.assert_close(merged[k], base + 0.1 * sum(model - base for model in models[: k + 1]))


def test_the_recursions_agree_if_the_scale_is_multiplied_by_the_number_of_tasks():
    base, models = make_models(4)
    utility, total = TaskArithmeticMerge(0.4, "utility"), TaskArithmeticMerge(0.1, "sum")
    torch.testing.assert_close(merge_stream(utility, base, models)[-1], merge_stream(total, base, models)[-1])


@pytest.mark.parametrize("recursion", ["utility", "sum"])
def test_the_order_of_the_tasks_does_not_matter(recursion):
    base, models = make_models(4)
    expected = merge_stream(TaskArithmeticMerge(0.3, recursion), base, models, WEIGHTS)[-1]
    for order in permutations(range(4)):
        streamed = [models[index] for index in order], [WEIGHTS[index] for index in order]
        merged = merge_stream(TaskArithmeticMerge(0.3, recursion), base, *streamed)[-1]
        torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, r"scale must lie in \(0, inf\), got scale=0.0"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"recursion": "mean"}, "recursion is one of utility, sum, got 'mean'"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskArithmeticMerge(**settings)


@pytest.mark.parametrize("recursion", ["utility", "sum"])
def test_a_task_taken_out_leaves_the_model_of_the_others(recursion):
    base, models = make_models(3)
    weights = [1.0, 0.5, 2.0]
    merged = merge_stream(TaskArithmeticMerge(0.3, recursion), base, models, weights)[-1]
    left = TaskArithmeticMerge(0.3, recursion).remove(merged, models[1], 0.5 / 3.5, make_context(base)).theta
    others = merge_stream(TaskArithmeticMerge(0.3, recursion), base, [models[0], models[2]], [1.0, 2.0])[-1]
    torch.testing.assert_close(left, others)

import torch

from lightning_odem.flow import operating_time
from lightning_odem.methods import AverageMerge, MergeContext

CONTEXT = MergeContext([], [])


def test_a_stream_of_averages_is_the_weighted_mean_of_all_models():
    models = torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = [1.0, 0.5, 2.0, 0.0, 3.0]
    merged = models[0].clone()
    for k in range(1, 5):
        merged = AverageMerge().merge(merged, models[k], operating_time(weights[: k + 1]), CONTEXT).theta
    expected = (torch.tensor(weights).double() @ models) / sum(weights)
    torch.testing.assert_close(merged, expected)


def test_the_merge_uses_the_memory_of_the_merged_model_only():
    merged, incoming = torch.zeros(4), torch.ones(4)
    result = AverageMerge().merge(merged, incoming, 0.25, CONTEXT)
    assert result.theta is merged
    assert result.trajectory is None
    assert torch.equal(incoming, torch.ones(4))


def test_a_model_taken_out_leaves_the_mean_of_the_others():
    models = torch.randn(3, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    merged = weights @ models / 3.5
    left = AverageMerge().remove(merged, models[1], 0.5 / 3.5, CONTEXT).theta
    torch.testing.assert_close(left, (models[0] + 2.0 * models[2]) / 3.0)

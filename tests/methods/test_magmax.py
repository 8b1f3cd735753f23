from itertools import permutations

import pytest
import torch
from vectors import make_models, merge_stream

from lightning_odem.methods import MagMaxMerge


@pytest.mark.parametrize("scale", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("weights", [None, [1.0, 0.1, 2.0, 3.0]])
def test_the_stream_is_the_selection_among_all_task_vectors(scale, weights):
    base, models = make_models(4)
    merged = merge_stream(MagMaxMerge(scale), base, models, weights)
    for k in range(4):
        expected = base.clone()
        for entry in range(len(base)):
            changes = [float(model[entry] - base[entry]) for model in models[: k + 1]]
            expected[entry] += scale * max(changes, key=abs)
        torch.testing.assert_close(merged[k], expected)


def test_the_order_of_the_tasks_does_not_matter():
    base, models = make_models(4)
    expected = merge_stream(MagMaxMerge(), base, models)[-1]
    for order in permutations(models):
        assert torch.equal(merge_stream(MagMaxMerge(), base, list(order))[-1], expected)


def test_of_equal_changes_the_later_counts():
    merged = merge_stream(
        MagMaxMerge(1.0), torch.zeros(2), [torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])], shapes={"w": (2,)}
    )
    assert merged[-1].tolist() == [-1.0, 2.0]


def test_a_scale_is_positive():
    with pytest.raises(ValueError, match="scale=-1"):
        MagMaxMerge(-1)

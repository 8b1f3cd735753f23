import pytest
import torch
from torch import tensor

from lightning_odem.metrics import ClassAccuracy


def test_it_is_the_quotient_of_the_counts_to_the_last_bit():
    metric, generator = ClassAccuracy(), torch.Generator().manual_seed(0)
    correct = total = 0
    for size in (7, 1, 41):
        scores, target = torch.randn(size, 3, generator=generator), torch.randint(3, (size,), generator=generator)
        metric.update(scores, target)
        correct, total = correct + int((scores.argmax(1) == target).sum()), total + size
    assert metric.compute().item() == correct / total


def test_scores_of_one_class_and_floats_are_refused():
    for preds, target in (
        (torch.zeros(3, 1), tensor([0, 1, 0])),
        (torch.zeros(3), tensor([0, 1, 0])),
        (torch.zeros(3, 2), torch.zeros(3)),
        (torch.zeros(3, 2), tensor([0, 1])),
    ):
        with pytest.raises(ValueError, match="2 or more classes"):
            ClassAccuracy().update(preds, target)

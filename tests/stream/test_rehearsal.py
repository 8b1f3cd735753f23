import pytest
import torch
from torch.nn import functional as F

from lightning_odem.stream.rehearsal import ClassLabels


def test_one_sample_of_each_label_outside_is_doubtful():
    with ClassLabels("a") as labels:
        F.cross_entropy(torch.zeros(3, 10), torch.tensor([0, 9, 4]))
    assert labels.outside(torch.tensor([1, 98, -1, 98, 9])).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("scores", "targets", "options"),
    [
        ((2, 4, 3, 3), torch.full((2, 3, 3), 255), {"ignore_index": 255}),
        ((6, 4), torch.tensor([0, 1, -100, 3, 2, -100]), {}),
        ((2, 4), torch.full((2, 4), 0.25), {}),
        ((4,), torch.tensor(3), {}),
    ],
    ids=["segmentation", "tokens", "probabilities", "one sample"],
)
def test_targets_that_the_loss_takes_pass(scores, targets, options):
    with ClassLabels("a"):
        assert torch.isfinite(F.cross_entropy(torch.zeros(scores), targets, **options)) or "ignore_index" in options


def test_other_losses_have_no_classes():
    with ClassLabels("a") as labels:
        F.mse_loss(torch.zeros(3, 1), torch.full((3, 1), 40.0))
        F.binary_cross_entropy_with_logits(torch.zeros(3, 2), torch.ones(3, 2))
    assert labels.outside(torch.tensor([40, 99])).tolist() == []


@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss])
def test_a_label_outside_is_refused_before_the_loss_reads_it(loss):
    with ClassLabels("a"), pytest.raises(IndexError, match="task 'a' has a training sample of label 4, .* 4 classes"):
        loss(torch.zeros(2, 4), torch.tensor([1, 4]))

import pytest
import torch

from lightning_odem.calibration.prediction import split_targets

INPUTS, TARGETS = torch.zeros(2, 3), torch.ones(2)


@pytest.mark.parametrize("batch", [(INPUTS, TARGETS), [INPUTS, TARGETS]])
def test_a_pair_is_inputs_and_targets(batch):
    inputs, targets = split_targets(batch)
    assert inputs is INPUTS
    assert targets is TARGETS


@pytest.mark.parametrize("batch", [INPUTS, (INPUTS,), [INPUTS]])
def test_inputs_alone_have_no_targets_even_if_there_are_two(batch):
    inputs, targets = split_targets(batch)
    assert inputs is INPUTS
    assert targets is None


@pytest.mark.parametrize(
    ("batch", "found"),
    [((INPUTS, TARGETS, TARGETS), "tuple of 3"), ([], "list of 0"), ({"x": INPUTS, "y": TARGETS}, "dict")],
)
def test_other_batches_are_refused(batch, found):
    with pytest.raises(ValueError, match=rf"\(inputs, targets\), or inputs alone, got a {found}\."):
        split_targets(batch)

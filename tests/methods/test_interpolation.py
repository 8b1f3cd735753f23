import pytest
import torch
from vectors import make_models, merge_stream

from lightning_odem.methods import LinearInterpolation


@pytest.mark.parametrize("weights", [None, [1.0, 5.0, 0.1, 2.0]])
def test_the_first_model_counts_less_with_every_merge_whatever_the_weights(weights):
    base, models = make_models(4)
    merged = merge_stream(LinearInterpolation(0.25), base, models, weights)
    expected = 0.75**3 * models[0] + 0.25 * (0.75**2 * models[1] + 0.75 * models[2] + models[3])
    torch.testing.assert_close(merged[-1], expected)


@pytest.mark.parametrize("coefficient", [-0.1, 1.1, float("nan")])
def test_a_coefficient_lies_between_0_and_1(coefficient):
    with pytest.raises(ValueError, match=r"\[0, 1\], got coefficient="):
        LinearInterpolation(coefficient)

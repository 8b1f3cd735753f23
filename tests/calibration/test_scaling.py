import math

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss
from toy import make_trainer

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.calibration.scaling import LossScale, loss_scale
from lightning_odem.parameters.vector import ParameterVector


def make_objective(size, scale, autocast=True, dtype=torch.float32):
    """Squared loss of outputs of about ``size``, in fp16."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    inputs = torch.randn(6, 4).to(dtype)
    buffer = CalibrationBuffer(6)
    buffer.add("task", (inputs, torch.zeros(6, 2, dtype=dtype)))

    def batch_loss(batch):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            return mse_loss(size * net(batch.samples[0]).to(dtype), batch.samples[1])

    return CalibrationObjective(ParameterVector(net), buffer, batch_loss, 2, loss_scale=scale)


def gradient(objective):
    return objective.loss_and_grad(objective.vector.read())[1].double()


def test_a_gradient_that_vanishes_in_fp16_is_had_by_scaling_the_loss():
    size = 2e-4
    expected = gradient(make_objective(size, 1.0, autocast=False, dtype=torch.float64))
    assert gradient(make_objective(size, 1.0)).count_nonzero() == 0
    scaled = make_objective(size, 2.0**16)
    # fp16 has eleven bits.
    assert (gradient(scaled) - expected).norm() < 2e-3 * expected.norm()
    assert scaled.loss_scale.value == 2.0**16
    assert scaled.gradient_evaluations == 1


def test_a_scale_too_large_is_lowered_until_the_gradient_is_finite_and_stays_low():
    size = 5.0
    objective = make_objective(size, 2.0**16)
    expected = gradient(make_objective(size, 1.0, autocast=False, dtype=torch.float64))
    assert (gradient(objective) - expected).norm() < 2e-3 * expected.norm()
    lowered = objective.loss_scale.value
    assert 1.0 < lowered < 2.0**16
    passes = 1 + math.log2(2.0**16 / lowered)
    assert objective.gradient_evaluations == passes
    assert objective.sample_gradients == 6 * passes
    gradient(objective)
    assert objective.gradient_evaluations == passes + 1
    assert objective.loss_scale.value == lowered


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_fp16_the_bits_are_the_same_at_any_scale(dtype):
    objectives = [make_objective(1.0, scale, autocast=False, dtype=dtype) for scale in (1.0, 2.0**16, 1000.0)]
    plain, *scaled = [objective.loss_and_grad(objective.vector.read()) for objective in objectives]
    for loss, grad in scaled:
        assert loss == plain[0]
        assert torch.equal(grad, plain[1])


def test_a_gradient_that_is_not_finite_at_scale_1_is_returned():
    calls = []

    def broken(scale):
        calls.append(scale)
        return 1.0, torch.tensor([math.nan, 2.0])

    scale = LossScale(8.0)
    loss, grad = scale.differentiate(broken)
    assert calls == [8.0, 4.0, 2.0, 1.0]
    assert grad.isnan().tolist() == [True, False]
    assert scale.value == 1.0


def test_a_loss_that_is_not_finite_is_no_reason_to_lower_the_scale():
    scale = LossScale(8.0)
    loss, _ = scale.differentiate(lambda factor: (math.inf, torch.tensor([math.nan])))
    assert loss == math.inf
    assert scale.value == 8.0


def test_scales_are_powers_of_two_from_1_on():
    assert [LossScale(value).value for value in (0.1, 1.0, 3.0, 65536.0, 65535.0)] == [1.0, 1.0, 2.0, 65536.0, 32768.0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true", "bf16-true"])
def test_without_fp16_a_trainer_scales_no_loss(precision):
    assert loss_scale(make_trainer(precision=precision)) == 1.0


def test_in_fp16_the_scale_is_that_of_the_grad_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = make_trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert loss_scale(trainer) == 1024.0
    trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert loss_scale(trainer) == 2.0**16
    assert loss_scale(make_trainer(precision="16-true")) == 2.0**16

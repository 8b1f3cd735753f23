import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.methods import (
    METHODS,
    AverageMerge,
    BaseModel,
    Calibration,
    MagMaxMerge,
    MergeContext,
    MergeMethod,
    MergeResult,
    SecondMoments,
    Snapshots,
    resolve_method,
)
from lightning_odem.parameters.vector import ParameterVector


class Counting(MergeMethod):
    def __init__(self):
        self.merges = 0

    def merge(self, merged, incoming, t, context):
        self.merges += 1
        return MergeResult(incoming)

    def state_dict(self):
        return {"merges": self.merges}

    def load_state_dict(self, state):
        self.merges = state["merges"]


def test_a_rule_is_all_a_method_must_have():
    class Nothing(MergeMethod):
        pass

    with pytest.raises(TypeError, match="merge"):
        Nothing()
    method = Counting()
    assert method.needs == ()
    incoming = torch.ones(3)
    assert method.start(incoming, MergeContext([], [])).theta is incoming


def test_a_method_may_keep_state():
    method, other = Counting(), Counting()
    method.merge(torch.zeros(1), torch.zeros(1), 0.5, MergeContext([], []))
    other.load_state_dict(method.state_dict())
    assert other.merges == 1


@pytest.mark.parametrize("method", [AverageMerge(), MagMaxMerge()])
def test_a_method_without_state_refuses_that_of_another(method):
    method.load_state_dict(method.state_dict())
    with pytest.raises(ValueError, match=f"{type(method).__name__} keeps no state, but the stream has one: merges"):
        method.load_state_dict({"merges": 1})


def merge(name, t):
    """Merge random models of a linear regression with all that a method can need but the task's own data."""
    generator = torch.Generator().manual_seed(0)
    merged, incoming, base, halfway, moments = torch.randn(5, 20, generator=generator).unbind()
    before = merged.clone()
    net = nn.Linear(19, 1)
    vector, buffer = ParameterVector(net), CalibrationBuffer(6)
    buffer.add("a", (torch.randn(6, 19, generator=generator), torch.randn(6, 1, generator=generator)))
    context = MergeContext(
        vector.names,
        [tuple(shape) for shape in vector.shapes],
        {
            BaseModel: base,
            Calibration: CalibrationObjective(
                vector, buffer, lambda batch: mse_loss(net(batch.samples[0]), batch.samples[1])
            ),
            SecondMoments: moments.square(),
            Snapshots: [halfway],
        },
    )
    return resolve_method(name).merge(merged, incoming, t, context).theta, before, incoming


@pytest.mark.parametrize("name", METHODS)
def test_time_0_gives_the_merged_model_bit_by_bit(name):
    theta, merged, _ = merge(name, 0.0)
    assert torch.equal(theta, merged)


@pytest.mark.parametrize("name", ["average", "ode", "ode_paper"])
def test_time_1_gives_the_incoming_model_bit_by_bit_where_the_rule_interpolates(name):
    theta, _, incoming = merge(name, 1.0)
    assert torch.equal(theta, incoming)

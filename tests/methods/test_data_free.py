"""What all methods that need no data have in common."""

import pytest
import torch
from vectors import make_context, make_models, merge_stream

from lightning_odem.methods import (
    AverageMerge,
    DOPMerge,
    LinearInterpolation,
    MagMaxMerge,
    NUFILTMerge,
    OPCMMerge,
    TaskArithmeticMerge,
    TiesMerge,
)

MAKERS = {
    "average": AverageMerge,
    "task_arithmetic": TaskArithmeticMerge,
    "task_arithmetic_sum": lambda: TaskArithmeticMerge(recursion="sum"),
    "ties": TiesMerge,
    "ties_mean": lambda: TiesMerge(combine="mean"),
    "ties_sum": lambda: TiesMerge(recursion="sum"),
    "magmax": MagMaxMerge,
    "interpolation": LinearInterpolation,
    "opcm": OPCMMerge,
    "opcm_sum": lambda: OPCMMerge(recursion="sum"),
    "dop": lambda: DOPMerge(steps=5),
    "dop_sylvester": lambda: DOPMerge(alpha=None, solver="sylvester", others="average"),
    "nufilt": lambda: NUFILTMerge(steps=5),
    "nufilt_null_space": lambda: NUFILTMerge("null_space", others="average"),
}
OURS = {name: make for name, make in MAKERS.items() if name != "average"}


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_0_leaves_the_merged_model_and_the_state_bit_by_bit(make, dtype):
    base, models = make_models(3, dtype)
    method = make()
    merged = merge_stream(method, base, models[:2])[-1]
    merged[0] = -0.0
    models[2][1] = float("inf")
    state, before = method.state_dict(), merged.clone()
    theta = method.merge(merged, models[2], 0.0, make_context(base)).theta
    assert torch.equal(theta.view(torch.uint8), before.view(torch.uint8))
    assert method.state_dict() == state


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_only_the_merged_vector_is_written_to(make):
    base, models = make_models(3)
    copies = [tensor.clone() for tensor in (base, *models)]
    method, context = make(), make_context(base)
    merged = method.start(models[0], context).theta.clone()
    for k in (1, 2):
        merged = method.merge(merged, models[k], 1 / (k + 1), context).theta
        assert all(torch.equal(*pair) for pair in zip((base, *models), copies, strict=True))
        assert merged.dtype == torch.float64
        assert merged.isfinite().all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_stream_in_single_precision_stays_near_that_in_double(make):
    exact, single = (
        merge_stream(make(), *make_models(4, dtype), [1.0, 0.5, 2.0, 3.0]) for dtype in (torch.float64, torch.float32)
    )
    for expected, found in zip(exact, single, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_stream_of_base_models_stays_at_the_base_model(make):
    base, _ = make_models(0)
    for merged in merge_stream(make(), base, [base.clone() for _ in range(3)]):
        torch.testing.assert_close(merged, base, rtol=0, atol=1e-15)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_same_stream_gives_the_same_bits(make):
    base, models = make_models(3, torch.float32)
    first, second = (merge_stream(make(), base, models)[-1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("make", [MAKERS[name] for name in ("opcm", "dop", "nufilt")])
def test_methods_that_look_at_matrices_tell_how_far_they_are(make):
    base, models = make_models(2)
    steps = []
    make().merge(models[0], models[1], 0.5, make_context(base, on_step=lambda *step: steps.append(step)))
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("make", [OPCMMerge, DOPMerge, NUFILTMerge])
def test_a_pattern_that_matches_no_layer_is_an_error(make):
    base, models = make_models(2)
    with pytest.raises(ValueError, match=r"layers=\['fc'\] matches no weight matrix"):
        make(layers=["fc"]).merge(models[0], models[1], 0.5, make_context(base))

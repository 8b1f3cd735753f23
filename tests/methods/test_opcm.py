import math

import pytest
import torch
from vectors import MATRICES, SHAPES, flatten, make_context, make_models, merge_stream, unflatten

from lightning_odem.methods import OPCMMerge
from lightning_odem.methods.opcm import project

WEIGHTS = [1.0, 0.5, 2.0, 3.0]
VECTORS_ONLY = {"bias": (30,), "scale": (12,)}


def project_in_full(task_vector, update, alpha):
    """With square bases and an explicit matrix in them, as the released code has it."""
    u, s, vh = torch.linalg.svd(update, full_matrices=True)
    rank = int(((s.cumsum(0) / s.sum()) > alpha).float().argmax())
    inner = u.T @ task_vector @ vh.T
    inner.diagonal().fill_(0)
    inner[:rank, :rank] = 0
    return u @ inner @ vh


def released_stream(base, models, alpha, projected):
    """The released loop with deployed weights, lambda and the list of norms, tensor by tensor."""
    base, models = unflatten(base), [unflatten(model) for model in models]

    def length(model):
        return math.sqrt(sum(float((model[name] - base[name]).square().sum()) for name in base))

    merged, scale, norms = dict(models[0]), 1.0, [length(models[0])]
    yield flatten(merged)
    for model in models[1:]:
        norms.append(length(model))
        for name in base:
            update, task_vector = merged[name] - base[name], model[name] - base[name]
            if name in projected:
                flat = project_in_full(task_vector.flatten(1), update.flatten(1), alpha)
                task_vector = flat.view_as(task_vector)
            merged[name] = base[name] + scale * update + task_vector
        mean, total = sum(norms) / len(norms), length(merged)
        scale = total / mean
        merged = {name: base[name] + (merged[name] - base[name]) * mean / total for name in base}
        yield flatten(merged)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
def test_the_projection_is_that_of_the_released_code(shape, alpha):
    task_vector, update = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(project(task_vector, update, alpha), project_in_full(task_vector, update, alpha))


@pytest.mark.parametrize("seed", range(8))
def test_rounding_does_not_decide_which_directions_are_protected(seed):
    """4 + 3 is exactly 0.7 of 4 + 3 + 2 + 1, in whatever basis."""
    generator = torch.Generator().manual_seed(seed)
    inner, *bases = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    u, v = (torch.linalg.qr(basis).Q for basis in bases)
    update = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64).diag()
    found = project(u @ inner @ v.T, u @ update @ v.T, 0.7)
    inner.fill_diagonal_(0.0)[:2, :2] = 0.0
    torch.testing.assert_close(found, u @ inner @ v.T)


def test_alpha_1_removes_all_that_the_update_can_express():
    task_vector, update = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(project(task_vector, update, 1.0), torch.zeros(4, 4, dtype=torch.float64))


def test_the_projection_does_not_depend_on_the_scale_of_the_update():
    task_vector, update = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(project(task_vector, update), project(task_vector, 1e-3 * update))


def test_the_projected_part_is_orthogonal_to_the_update():
    task_vector, update = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float((project(task_vector, update) * update).sum()) == pytest.approx(0.0, abs=1e-12)


def test_a_matrix_that_has_not_moved_protects_nothing():
    task_vector = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(project(task_vector, torch.zeros(4, 6)), task_vector)


@pytest.mark.parametrize("alpha", [0.3, 0.5])
@pytest.mark.parametrize("recursion", ["utility", "sum"])
@pytest.mark.parametrize(("convolutions", "projected"), [(True, MATRICES), (False, MATRICES[1:])])
def test_at_equal_utility_the_stream_is_that_of_the_released_code(alpha, recursion, convolutions, projected):
    base, models = make_models(4)
    merged = merge_stream(OPCMMerge(alpha, recursion, convolutions), base, models)
    torch.testing.assert_close(merged, list(released_stream(base, models, alpha, projected)))


def test_layers_can_be_chosen():
    base, models = make_models(3)
    merged = merge_stream(OPCMMerge(layers=["tall"]), base, models)
    torch.testing.assert_close(merged, list(released_stream(base, models, 0.5, ["tall.weight"])))


def test_the_utility_recursion_is_that_of_the_paper():
    base, models = make_models(4)
    merged = merge_stream(OPCMMerge(), base, models, WEIGHTS)
    accumulated, norms = models[0] - base, [float((model - base).norm()) for model in models]
    for k in range(1, 4):
        ratio = WEIGHTS[k] / sum(WEIGHTS[: k + 1])
        update, projected = unflatten(merged[k - 1] - base), unflatten(models[k] - base)
        for name in MATRICES:
            flat = project_in_full(projected[name].flatten(1), update[name].flatten(1), 0.5)
            projected[name] = flat.view(SHAPES[name])
        accumulated = (1 - ratio) * accumulated + ratio * flatten(projected)
        scale = accumulated.norm() / (sum(norms[: k + 1]) / (k + 1))
        torch.testing.assert_close(merged[k], base + accumulated / scale)


def test_without_matrices_it_is_the_weighted_sum_at_the_mean_norm():
    base, models = make_models(4, shapes=VECTORS_ONLY)
    merged = merge_stream(OPCMMerge(), base, models, WEIGHTS, shapes=VECTORS_ONLY)[-1]
    total = sum(weight * (model - base) for weight, model in zip(WEIGHTS, models, strict=True))
    mean = sum(float((model - base).norm()) for model in models) / 4
    torch.testing.assert_close(merged, base + total * mean / total.norm())


@pytest.mark.parametrize("recursion", ["utility", "sum"])
def test_the_update_always_has_the_mean_norm(recursion):
    base, models = make_models(4)
    merged = merge_stream(OPCMMerge(recursion=recursion), base, models, WEIGHTS)
    norms = [float((model - base).norm()) for model in models]
    for k in range(4):
        assert float((merged[k] - base).norm()) == pytest.approx(sum(norms[: k + 1]) / (k + 1))


def test_task_vectors_that_cancel_leave_the_base_model():
    shapes = {"bias": (3,)}
    base, change = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    method = OPCMMerge()
    merged = merge_stream(method, base, [change, -change, change], shapes=shapes)
    assert torch.equal(merged[1], base)
    torch.testing.assert_close(merged[2], change)
    assert torch.equal(merge_stream(method, base, [base, base], shapes=shapes)[-1], base)


def test_the_state_of_a_stream_in_another_process_gives_the_same_models():
    base, models = make_models(4)
    expected = merge_stream(OPCMMerge(), base, models)[-1]
    first, second = OPCMMerge(), OPCMMerge()
    merged = merge_stream(first, base, models[:3])[-1]
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.merge(merged.clone(), models[3], 0.25, make_context(base)).theta, expected)
    without = OPCMMerge().merge(merged.clone(), models[3], 0.25, make_context(base)).theta
    assert not torch.allclose(without, expected)


def test_a_stream_begun_by_another_method_counts_as_one_task():
    base, models = make_models(2)
    expected = merge_stream(OPCMMerge(), base, models)[-1]
    assert torch.equal(OPCMMerge().merge(models[0].clone(), models[1], 0.5, make_context(base)).theta, expected)


def test_a_second_stream_does_not_remember_the_first():
    base, models = make_models(3)
    method = OPCMMerge()
    first = merge_stream(method, base, models)
    assert torch.equal(merge_stream(method, base, models)[-1], first[-1])


def test_the_state_of_another_method_is_refused():
    with pytest.raises(ValueError, match="keeps scale and norms, but the stream's state has: momentum"):
        OPCMMerge().load_state_dict({"momentum": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got alpha=1.5"),
        ({"recursion": "mean"}, "recursion is one of utility, sum"),
        ({"layers": "fc"}, r"layers is a list of patterns, got the string 'fc'; write \['fc'\]"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OPCMMerge(**settings)

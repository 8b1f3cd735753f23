import pytest
import torch
from vectors import MATRICES, SHAPES, make_context, make_models, merge_stream, unflatten

from lightning_odem.methods import NUFILTMerge
from lightning_odem.methods.nufilt import input_directions

SMALL = {"null_rank": 3, "null_share": 0.5, "task_rank": 2, "lora_rank": 4, "steps": 20, "lr": 1e-2}


def filter_by_hand(task_vector, update, generator=None, *, null_rank, null_share, task_rank, lora_rank, steps, lr):
    """P + B A for one matrix: both terms of the loss as they stand in the paper, Adam by its formulas, in fp64."""
    inputs = task_vector.shape[1]
    null_rank = min(null_rank, max(round(null_share * inputs), 1))
    seen = torch.linalg.svd(update)[2].T[:, :null_rank]
    projector = torch.eye(inputs, dtype=torch.float64) - seen @ seen.T
    if generator is None:
        return projector
    own = torch.linalg.svd(task_vector)[2].T[:, :task_rank]
    a = (0.02 * torch.randn(lora_rank, inputs, generator=generator)).double()
    b = torch.zeros(inputs, lora_rank, dtype=torch.float64)
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in (a, b)]
    for step in range(1, steps + 1):
        a.requires_grad_(), b.requires_grad_()
        merged = update + task_vector @ projector + task_vector @ b @ a
        loss = ((task_vector - merged) @ own).square().sum() + ((update - merged) @ seen).square().sum()
        gradients = torch.autograd.grad(loss, (a, b))
        a, b = a.detach(), b.detach()
        for parameter, gradient, moment in zip((a, b), gradients, moments, strict=True):
            moment[0] = 0.9 * moment[0] + 0.1 * gradient
            moment[1] = 0.999 * moment[1] + 0.001 * gradient**2
            scale = (moment[1] / (1 - 0.999**step)).sqrt() + 1e-8
            parameter -= lr * moment[0] / (1 - 0.9**step) / scale
    return projector + b @ a


@pytest.mark.parametrize("variant", ["full", "null_space"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5, 1.0]])
def test_the_stream_is_that_written_out(variant, weights):
    base, models = make_models(4)
    merged = merge_stream(NUFILTMerge(variant, **SMALL), base, models, weights)
    base, models = unflatten(base), [unflatten(model) for model in models]
    expected = base | {name: models[0][name] for name in MATRICES}
    for k in range(4):
        generator = torch.Generator().manual_seed(0) if variant == "full" else None
        for name in MATRICES if k else ():
            update, task_vector = ((model[name] - base[name]).flatten(1) for model in (expected, models[k]))
            change = task_vector @ filter_by_hand(task_vector, update, generator, **SMALL)
            expected[name] = expected[name] + change.view(SHAPES[name])
        for name, tensor in unflatten(merged[k]).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-7, atol=1e-7)


def test_the_protected_directions_see_no_change_without_the_correction():
    base, models = make_models(2)
    merged = merge_stream(NUFILTMerge("null_space", **SMALL), base, models)
    base, before, after = (unflatten(vector) for vector in (base, *merged))
    for name in MATRICES:
        directions = input_directions((before[name] - base[name]).flatten(1), 2)
        change = (after[name] - before[name]).flatten(1)
        assert float((change @ directions).abs().max()) < 1e-12 < float(change.abs().max())


def test_tasks_that_use_other_inputs_are_all_kept():
    base, models = make_models(3, shapes={"w": (6, 9)})
    for k, model in enumerate(models):
        columns = torch.eye(3)[k].repeat_interleave(3)
        models[k] = base + ((model - base).view(6, 9) * columns).flatten()
    method = NUFILTMerge("null_space", null_share=1.0)
    merged = merge_stream(method, base, models, shapes={"w": (6, 9)})[-1]
    torch.testing.assert_close(merged, sum(models) - 2 * base)


def test_the_correction_gives_part_of_the_task_back():
    base, models = make_models(2, shapes={"w": (20, 16)})
    wanted = (models[1] - base).view(20, 16)
    own = input_directions(wanted, 8)
    distances = []
    for variant in ("null_space", "full"):
        method = NUFILTMerge(variant, null_share=0.5, steps=100, lr=1e-2)
        merged = merge_stream(method, base, models, shapes={"w": (20, 16)})[-1]
        distances.append(float((((merged - base).view(20, 16) - wanted) @ own).norm()))
    assert distances[1] < 0.9 * distances[0]


@pytest.mark.parametrize("others", ["base", "average"])
def test_other_parameters_stay_as_in_the_base_model_or_are_averaged(others):
    base, models = make_models(3)
    method = NUFILTMerge("null_space", others=others)
    merged = [unflatten(vector) for vector in merge_stream(method, base, models, [1.0, 3.0, 4.0])]
    base, models = unflatten(base), [unflatten(model) for model in models]
    for name in SHAPES.keys() - set(MATRICES):
        shares = [[1.0, 0, 0], [0.25, 0.75, 0], [0.125, 0.375, 0.5]]
        for k in range(3):
            average = sum(share * model[name] for share, model in zip(shares[k], models, strict=True))
            torch.testing.assert_close(merged[k][name], base[name] if others == "base" else average)


def test_the_first_task_is_not_filtered():
    base, models = make_models(1)
    (merged,) = merge_stream(NUFILTMerge(layers=["wide"]), base, models)
    base, model, merged = (unflatten(vector) for vector in (base, models[0], merged))
    for name in SHAPES:
        assert torch.equal(merged[name], (model if name == "wide.weight" else base)[name])


@pytest.mark.parametrize("variant", ["full", "null_space"])
def test_a_layer_that_has_not_moved_filters_nothing(variant):
    base, (model, *_) = make_models(1)
    merged = NUFILTMerge(variant, steps=5).merge(base.clone(), model, 0.5, make_context(base)).theta
    base, model, merged = (unflatten(vector) for vector in (base, model, merged))
    for name in MATRICES:
        torch.testing.assert_close(merged[name], model[name])


@pytest.mark.parametrize(
    ("settings", "inputs", "protected"),
    [({}, 768, 128), ({}, 900, 128), ({}, 36, 6), ({}, 2, 1), ({"null_rank": 4}, 36, 4), ({"null_share": 1}, 36, 36)],
)
def test_a_sixth_of_the_inputs_is_protected_and_128_at_most(settings, inputs, protected):
    shape = (140, inputs)
    old, new = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    context = make_context(torch.zeros(140 * inputs), {"w": shape})
    merged = NUFILTMerge("null_space", **settings).merge(old.flatten().clone(), new.flatten(), 0.5, context).theta
    seen = (merged.view(shape) - old) @ torch.linalg.svd(old)[2].T
    assert int((seen.norm(dim=0) < 1e-3).sum()) == protected


def test_the_seed_decides_the_correction():
    base, models = make_models(2)
    first, again, other = (merge_stream(NUFILTMerge(seed=seed, steps=5), base, models)[-1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_learns_under_no_grad_and_leaves_the_random_state():
    base, models = make_models(2)
    expected, state = merge_stream(NUFILTMerge(steps=5), base, models)[-1], torch.get_rng_state()
    with torch.no_grad():
        merged = merge_stream(NUFILTMerge(steps=5), base, models)[-1]
    assert torch.equal(merged, expected)
    assert not merged.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "lora"}, "variant is one of full, null_space, got 'lora'"),
        ({"null_rank": 0}, r"null_rank must lie in \[1, inf\), got null_rank=0"),
        ({"task_rank": 0}, "task_rank=0"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"null_share": 0.0}, "null_share=0.0"),
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"others": "mean"}, "others is one of base, average, got 'mean'"),
        ({"layers": "fc"}, "layers is a list of patterns"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NUFILTMerge(**settings)

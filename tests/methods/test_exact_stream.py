import itertools
from functools import partial

import pytest
import torch
from vectors import MATRICES, SHAPES, flatten, make_context, make_models, merge_stream, unflatten

from lightning_odem.methods import ClosedFormMerge, IsotropicMerge, MergeContext, MergeResult, TaskSingularVectorsMerge
from lightning_odem.methods.needs import BaseModel

WEIGHTS = [1.0, 3.0, 0.5, 2.0]


def mean(tensors, weights):
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True)) / sum(weights)


def isotropic(updates, weights):
    """The rule on all models at once, written out."""
    number = sum(weights) ** 2 / sum(weight**2 for weight in weights)
    u, s, vh = torch.linalg.svd(number * mean(updates, weights), full_matrices=False)
    return s.mean() * u @ vh


def closed_form(updates, weights, ridge=0.1):
    """The least-squares problem as one tall system over all tasks, solved by QR."""
    shares = [weight / sum(weights) for weight in weights]
    roots = [update / update.norm() for update in updates]  # C = root^T root
    trace = sum(share * root.square().sum() for share, root in zip(shares, roots, strict=True))
    average = mean(updates, weights)
    rows, targets = [], []
    for share, root, update in zip(shares, roots, updates, strict=True):
        rows.append(share**0.5 * root)
        targets.append(share**0.5 * root @ update.T)
    size = average.shape[1]
    rows.append((ridge * trace) ** 0.5 * torch.eye(size, dtype=average.dtype))
    targets.append((ridge * trace) ** 0.5 * average.T)
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(targets), driver="gels").solution.T


def singular_vectors(updates, weights):
    number = len(updates)
    lefts, values, rights = [], [], []
    for weight, update in zip(weights, updates, strict=True):
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        rank = max(len(s) // number, 1)
        lefts.append(u[:, :rank])
        values.append(s[:rank] * number * weight / sum(weights))
        rights.append(vh[:rank])

    def polar(matrix):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vh

    return polar(torch.cat(lefts, 1)) @ torch.diag(torch.cat(values)) @ polar(torch.cat(rights))


RULES = {
    "isotropic": (partial(IsotropicMerge, 1.0), isotropic),
    "closed_form": (ClosedFormMerge, closed_form),
    "task_singular_vectors": (TaskSingularVectorsMerge, singular_vectors),
}
both = pytest.mark.parametrize(("make", "one_shot"), RULES.values(), ids=RULES)


def at_once(one_shot, base, models, weights):
    """The merged model from all models at once: the rule for matrices, the average for the rest."""
    parts, start = [unflatten(model - base) for model in models], unflatten(base)
    merged = {}
    for name, shape in SHAPES.items():
        updates = [part[name] for part in parts]
        if name.endswith("weight"):
            update = one_shot([update.flatten(1) for update in updates], weights).view(shape)
        else:
            update = mean(updates, weights)
        merged[name] = start[name] + update
    return flatten(merged)


@both
@pytest.mark.parametrize("weights", [[1.0] * 4, WEIGHTS])
def test_the_stream_equals_the_rule_on_all_models_at_once(make, one_shot, weights):
    base, models = make_models(4)
    for number, merged in enumerate(merge_stream(make(), base, models, weights), start=1):
        if number > 1:
            torch.testing.assert_close(merged, at_once(one_shot, base, models[:number], weights[:number]))


@both
def test_the_order_of_the_tasks_does_not_matter(make, one_shot):
    base, models = make_models(4)
    ends = [
        merge_stream(make(), base, [models[i] for i in order], [WEIGHTS[i] for i in order])[-1]
        for order in itertools.permutations(range(4))
    ]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])


@both
def test_one_task_alone_gives_its_own_model(make, one_shot):
    base, models = make_models(2)
    assert torch.equal(merge_stream(make(), base, models[:1])[-1], models[0])
    # Also behind tasks that do not count.
    assert torch.equal(merge_stream(make(), base, models, [0.0, 1.0])[-1], models[1])


@both
def test_a_task_of_weight_0_changes_nothing(make, one_shot):
    base, models = make_models(3)
    with_it = merge_stream(make(), base, [models[0], models[2], models[1]], [1.0, 0.0, 2.0])
    without = merge_stream(make(), base, [models[0], models[1]], [1.0, 2.0])
    assert torch.equal(with_it[1], with_it[0])
    assert torch.equal(with_it[-1], without[-1])


@both
def test_the_state_goes_on_where_it_was(make, one_shot):
    base, models = make_models(3)
    context, first, second = make_context(base), make(), make()
    merged = first.merge(first.start(models[0], context).theta.clone(), models[1], 0.5, context).theta
    second.load_state_dict(first.state_dict())
    ends = [method.merge(merged.clone(), models[2], 1 / 3, context).theta for method in (first, second)]
    assert torch.equal(*ends)


@both
def test_a_state_of_another_method_is_refused(make, one_shot):
    with pytest.raises(ValueError, match="the stream's state has: velocity"):
        make().load_state_dict({"velocity": torch.zeros(2)})


@both
def test_a_stream_that_another_method_began_counts_as_one_task(make, one_shot):
    base, models = make_models(2)
    context = make_context(base)
    taken_over = make().merge(models[0].clone(), models[1], 0.25, context).theta
    torch.testing.assert_close(taken_over, merge_stream(make(), base, models, [3.0, 1.0])[-1])


@both
def test_a_recursion_feeds_the_merged_model_back_in(make, one_shot):
    base, models = make_models(3)
    merged = merge_stream(make(recursion=True), base, models, WEIGHTS[:3])
    for before, after, incoming in zip(merged[:-1], merged[1:], models[1:], strict=True):
        torch.testing.assert_close(after, at_once(one_shot, base, [before, incoming], [1.0, 1.0]))


@pytest.mark.parametrize("make", [IsotropicMerge, partial(IsotropicMerge, 1.0), ClosedFormMerge])
@pytest.mark.parametrize("gone", range(4))
def test_a_task_taken_out_leaves_the_model_of_the_others(make, gone):
    base, models = make_models(4)
    method, context = make(), make_context(base)
    merged = method.start(models[0].clone(), context).theta.clone()
    for k in range(1, 4):
        merged = method.merge(merged, models[k], WEIGHTS[k] / sum(WEIGHTS[: k + 1]), context).theta
    result = method.remove(merged, models[gone], WEIGHTS[gone] / sum(WEIGHTS), context)
    others = [index for index in range(4) if index != gone]
    left = merge_stream(make(), base, [models[i] for i in others], [WEIGHTS[i] for i in others])[-1]
    assert isinstance(result, MergeResult)
    torch.testing.assert_close(result.theta, left)


@both
def test_packed_attention_merges_as_the_three_layers_it_holds(make, one_shot):
    apart = {f"attn.{part}.weight": (4, 4) for part in "qkv"}
    packed = {"attn.qkv.weight": (12, 4)}
    base, models = make_models(3, shapes=apart)
    ends = [merge_stream(make(), base, models, shapes=shapes)[-1] for shapes in (apart, packed)]
    torch.testing.assert_close(*ends)


@both
@pytest.mark.parametrize("convolved", ["conv.weight", "qkv.weight"])
def test_a_grouped_convolution_merges_as_the_convolutions_it_holds(make, one_shot, convolved):
    apart, packed = {f"{part}.weight": (4, 2, 3) for part in range(3)}, {convolved: (12, 2, 3)}
    base, models = make_models(3, shapes=apart)
    expected = merge_stream(make(), base, models, WEIGHTS[:3], apart)[-1]
    found = merge_stream(make(), base, models, WEIGHTS[:3], packed, groups={convolved: 3})[-1]
    torch.testing.assert_close(found, expected)


@both
def test_a_depthwise_convolution_is_averaged(make, one_shot):
    shapes = {"conv.weight": (6, 1, 3)}
    base, models = make_models(3, shapes=shapes)
    merged = merge_stream(make(), base, models, WEIGHTS[:3], shapes, groups={"conv.weight": 6})[-1]
    torch.testing.assert_close(merged, mean(models, WEIGHTS[:3]))


@both
@pytest.mark.parametrize("name", ["c_attn.weight", "c_fc.weight"])
def test_a_weight_stored_by_inputs_merges_as_its_transpose(make, one_shot, name):
    stored, turned = {name: (4, 12)}, {name: (12, 4)}
    base, models = make_models(3, shapes=stored)
    found = merge_stream(make(), base, models, WEIGHTS[:3], stored, transposed=frozenset(stored))[-1]
    turn = [model.view(4, 12).T.reshape(-1) for model in (base, *models)]
    expected = merge_stream(make(), turn[0], turn[1:], WEIGHTS[:3], turned)[-1]
    torch.testing.assert_close(found.view(4, 12).T, expected.view(12, 4))


@both
def test_a_layer_that_no_task_has_moved_stays(make, one_shot):
    base, models = make_models(3)
    for model in models:
        model[:72] = base[:72]  # conv.weight
    merged = merge_stream(make(), base, models)[-1]
    assert torch.equal(merged[:72], base[:72])


def test_by_default_isotropic_merging_goes_as_far_as_the_tasks_did():
    base, models = make_models(4)
    merged = merge_stream(IsotropicMerge(), base, models, WEIGHTS)[-1]

    def distance(model):
        parts = unflatten(model - base)
        return torch.cat([parts[name].flatten() for name in MATRICES]).norm()

    expected = mean([distance(model) for model in models], WEIGHTS)
    torch.testing.assert_close(distance(merged), expected)


def test_a_parameter_new_to_the_stream_is_taken_to_be_as_in_the_merged_model():
    base, models = make_models(2)
    few = {name: shape for name, shape in SHAPES.items() if name != "tall.weight"}
    method = IsotropicMerge(1.0)
    parts = [unflatten(model) for model in (base, *models)]
    start = flatten({name: parts[1][name] for name in few})
    method.start(
        start, MergeContext(list(few), list(few.values()), needed={BaseModel: flatten({n: parts[0][n] for n in few})})
    )
    merged = method.merge(models[0].clone(), models[1], 0.5, make_context(base)).theta
    torch.testing.assert_close(merged, merge_stream(IsotropicMerge(1.0), base, models)[-1])


def test_another_shape_is_refused_by_name():
    base, models = make_models(2)
    method = ClosedFormMerge()
    method.start(models[0], make_context(base))
    other = {**SHAPES, "wide.weight": (12, 4), "wide.bias": (4,)}
    with pytest.raises(ValueError, match=r"has not kept cross/conv.weight:0, the model gives \(3, 12\)"):
        method.merge(models[0].clone(), models[1], 0.5, make_context(base, groups={"conv.weight": 2}))
    with pytest.raises(ValueError, match=r"wide.weight in shape \(4, 12\), the model gives \(12, 4\)"):
        method.merge(models[0].clone(), models[1], 0.5, make_context(base, other))


@pytest.mark.parametrize("make", [IsotropicMerge, ClosedFormMerge])
def test_when_one_task_is_left_the_model_is_its_own(make):
    base, models = make_models(3)
    method, context = make(), make_context(base)
    merged = method.start(models[0].clone(), context).theta.clone()
    for k in (1, 2):
        merged = method.merge(merged, models[k], WEIGHTS[k] / sum(WEIGHTS[: k + 1]), context).theta
    merged = method.remove(merged, models[1], WEIGHTS[1] / sum(WEIGHTS[:3]), context).theta
    merged = method.remove(merged, models[0], WEIGHTS[0] / (WEIGHTS[0] + WEIGHTS[2]), context).theta
    torch.testing.assert_close(merged, models[2])
    torch.testing.assert_close(
        method.merge(merged, models[0], 0.5, context).theta, merge_stream(make(), base, [models[2], models[0]])[-1]
    )


def test_a_task_without_a_share_is_taken_out_without_a_change():
    base, models = make_models(3)
    method, context = IsotropicMerge(), make_context(base)
    merged = merge_stream(method, base, models)[-1]
    state = method.state_dict()
    assert torch.equal(method.remove(merged.clone(), models[0], 0.0, context).theta, merged)
    assert method.state_dict()["mean"] is state["mean"]

from copy import deepcopy

import pytest
import torch
from torch import nn

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.calibration.batch_norm import BatchNormStatistics
from lightning_odem.parameters.snapshot import take_snapshot

SIZES = {"a": 20, "b": 7}


def inputs(size, shape=(3,), seed=0):
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(seed)) * 2 + seed + 1


def make_buffer(shape=(3,), sizes=SIZES):
    buffer = CalibrationBuffer(100)
    for seed, (task, size) in enumerate(sizes.items()):
        buffer.add(task, (inputs(size, shape, seed), torch.zeros(size)))
    return buffer


def norm_net(seed=0):
    torch.manual_seed(seed)
    net = nn.ModuleDict(
        {"body": nn.BatchNorm1d(3), "head": nn.BatchNorm1d(3), "plain": nn.BatchNorm1d(3, affine=False)}
    )
    net["none"] = nn.BatchNorm1d(3, track_running_stats=False)
    for name in ("body", "head", "plain"):
        net[name].running_mean.normal_()
        net[name].running_var.uniform_(0.5, 2)
        net[name].num_batches_tracked.fill_(seed)
    return net.eval()


def recalibrate(net, buffer=None, batch_size=128, exclude=(), forward=None):
    statistics = BatchNormStatistics(net, exclude, "recalibrate")
    statistics.recalibrate(buffer or make_buffer(), lambda batch: (forward or net)(batch.samples[0]).sum(), batch_size)


def test_read_and_write_go_round():
    net = norm_net()
    statistics = BatchNormStatistics(net, (), "average")
    before, values = take_snapshot(net), statistics.read()
    for layer in ("body", "head", "plain"):
        net[layer].reset_running_stats()
    statistics.write_(values)
    after = take_snapshot(net)
    assert len(values) == 6
    assert all(torch.equal(after[name], before[name]) for name in before if "running" in name)


@pytest.mark.parametrize(
    ("policy", "t", "weight"),
    [
        ("average", 0.25, 0.25),
        ("recalibrate", 0.25, 0.25),
        ("keep", 0.25, 0.0),
        ("average", 0.0, 0.0),
        ("average", 1, 1),
    ],
)
def test_interpolation_goes_from_the_merged_model_to_the_incoming_one(policy, t, weight):
    net = norm_net(0)
    merged, incoming = take_snapshot(norm_net(1)), take_snapshot(net)
    BatchNormStatistics(net, ("head",), policy).interpolate(merged, t)
    result = take_snapshot(net)
    for name in ("body.running_mean", "body.running_var", "plain.running_mean", "plain.running_var"):
        torch.testing.assert_close(result[name], (1 - weight) * merged[name] + weight * incoming[name])
        assert weight not in (0, 1) or torch.equal(result[name], (merged, incoming)[int(weight)][name])
    for name in ("head.running_mean", "head.running_var", "body.num_batches_tracked", "body.weight"):
        assert torch.equal(result[name], incoming[name])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 128])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (3,)), (nn.BatchNorm2d, (3, 4, 2))])
def test_recalibrated_statistics_are_those_of_the_pooled_inputs_by_share(kind, shape, batch_size):
    net = kind(3).eval()
    recalibrate(net, make_buffer(shape), batch_size)
    # Half of the weight to each task, whatever its size.
    weights = torch.cat([torch.full((size,), 0.5 / size, dtype=torch.float64) for size in SIZES.values()])
    pooled = torch.cat([inputs(size, shape, seed) for seed, size in enumerate(SIZES.values())]).double()
    values = pooled.view(len(pooled), 3, -1)
    mean = torch.einsum("n,nc->c", weights, values.mean(2))
    var = torch.einsum("n,nc->c", weights, (values - mean.view(1, 3, 1)).square().mean(2))
    torch.testing.assert_close(net.running_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(net.running_var.double(), var, rtol=1e-6, atol=0)


def test_deeper_layers_are_recalibrated_on_normalised_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2)).eval()
    recalibrate(net, make_buffer(sizes={"a": 20}))
    hidden = net[0](inputs(20))
    deep = net[3](((hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()).relu())
    torch.testing.assert_close(net[4].running_mean, deep.mean(0))
    torch.testing.assert_close(net[4].running_var, deep.var(0, correction=0))


def test_a_layer_used_twice_pools_both_uses():
    net = nn.BatchNorm1d(3).eval()
    recalibrate(net, make_buffer(sizes={"a": 20}), forward=lambda x: net(x) + net(3 * x))
    both = torch.cat([inputs(20), 3 * inputs(20)])
    torch.testing.assert_close(net.running_mean, both.mean(0))
    torch.testing.assert_close(net.running_var, both.var(0, correction=0))


def test_excluded_and_unused_layers_keep_their_statistics():
    net = norm_net()
    before = take_snapshot(net)
    recalibrate(net, exclude=("head",), forward=lambda x: net["head"](net["body"](x)))
    after = take_snapshot(net)
    changed = {name for name in before if "running" in name and not torch.equal(before[name], after[name])}
    assert changed == {"body.running_mean", "body.running_var"}


@pytest.mark.parametrize("fails", [False, True])
def test_flags_momentum_and_hooks_are_as_before(fails):
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(), nn.BatchNorm1d(3, momentum=None)).eval()

    def forward(batch):
        assert not net[1].training
        assert not fails, "on purpose"
        return net(batch)

    if fails:
        with pytest.raises(AssertionError, match="on purpose"):
            recalibrate(net, forward=forward)
    else:
        recalibrate(net, forward=forward)
    assert [module.training for module in net.modules()] == [False] * 4
    assert [net[0].momentum, net[2].momentum] == [0.3, None]
    assert not net[0]._forward_pre_hooks


def test_compiled_modules_are_recalibrated_as_uncompiled_ones():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    inner = deepcopy(net)
    compiled = nn.Sequential(torch.compile(inner, backend="eager"))
    with torch.no_grad():
        compiled(inputs(20))  # compiled before the recalibration
    for model in (net, compiled):
        recalibrate(model)
    assert torch.equal(inner[1].running_mean, net[1].running_mean)
    assert torch.equal(inner[1].running_var, net[1].running_var)
    torch.testing.assert_close(compiled(inputs(20)), net(inputs(20)))


def test_low_precision_statistics_are_estimated_in_fp32():
    net, buffer = nn.BatchNorm1d(3).eval().to(torch.bfloat16), CalibrationBuffer(100)
    buffer.add("a", (inputs(50).bfloat16(), torch.zeros(50)))
    recalibrate(net, buffer)
    expected = inputs(50).bfloat16().double()
    assert torch.equal(net.running_mean, expected.mean(0).bfloat16())
    assert torch.equal(net.running_var, expected.var(0, correction=0).bfloat16())

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_odem.parameters.vector import ParameterVector, canonical_name, check_same_shapes, is_excluded

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def make_net(*dtypes):
    torch.manual_seed(0)
    first, last = dtypes if len(dtypes) == 2 else (dtypes or (FP32,)) * 2
    return nn.Sequential(nn.Linear(3, 4).to(first), nn.Tanh(), nn.Linear(4, 2).to(last))


def tied_net():
    net = make_net().extend([nn.Linear(2, 4), nn.Linear(4, 2)])
    net[4].weight = net[2].weight
    return net


def batches(n, dtype=FP32):
    return torch.randn(n, 5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


def flat_gradient(net, parameters, losses):
    """The sum of the gradients of several losses, by ``torch.autograd.grad``."""
    total = torch.autograd.grad(sum(losses(net)), parameters, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in total])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [((FP32,), FP32), ((BF16,), FP32), ((FP64,), FP64), ((BF16, FP32), FP32), ((BF16, FP64), FP64)],
)
def test_read_and_write_keep_values_dtypes_and_storage(dtypes, expected):
    net = make_net(*dtypes)
    vector = ParameterVector(net)
    parameters = list(net.parameters())
    assert torch.equal(
        vector.read(), torch.cat([parameter.detach().flatten().to(expected) for parameter in parameters])
    )
    assert vector.read().dtype == expected
    storage = [(parameter.data_ptr(), parameter.dtype, parameter.requires_grad) for parameter in parameters]
    new = torch.randn(len(vector), dtype=expected, generator=torch.Generator().manual_seed(2))
    vector.write_(new)
    pieces = new.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        assert torch.equal(parameter.flatten(), piece.to(parameter.dtype))
    assert [(parameter.data_ptr(), parameter.dtype, parameter.requires_grad) for parameter in parameters] == storage


def test_read_shares_no_memory_with_the_parameters():
    vector = ParameterVector(make_net())
    before = vector.read()
    kept = before.clone()
    vector.write_(torch.zeros(len(vector)))
    assert torch.equal(before, kept)


def test_tied_weights_count_once():
    net = tied_net()
    vector = ParameterVector(net)
    assert len(vector) == sum(parameter.numel() for parameter in net.parameters())
    assert "4.weight" not in vector.names
    vector.write_(torch.arange(float(len(vector))))
    assert net[4].weight is net[2].weight
    assert torch.equal(vector.read(), torch.arange(float(len(vector))))


def test_frozen_and_excluded_parameters_are_left_out():
    net = make_net()
    net[0].weight.requires_grad_(False)
    vector = ParameterVector(net, exclude=["2"])
    assert vector.names == ["0.bias"]
    kept = [parameter.clone() for parameter in (net[0].weight, net[2].weight, net[2].bias)]
    vector.write_(torch.ones(4))
    assert all(map(torch.equal, kept, (net[0].weight, net[2].weight, net[2].bias)))


def test_nothing_left_to_merge_is_an_error():
    with pytest.raises(ValueError, match=r"No trainable parameter of Sequential .* of 4 .* exclude=\['\*'\]"):
        ParameterVector(make_net(), exclude=["*"])


def test_compiled_submodules_have_the_names_of_uncompiled_ones():
    net, compiled = make_net(), make_net()
    compiled[2] = torch.compile(compiled[2], backend="eager")
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    vector = ParameterVector(compiled)
    assert vector.names == ParameterVector(net).names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(vector.gather(dict(net.named_parameters())), vector.read())
    assert ParameterVector(compiled, exclude=["2"]).names == ["0.weight", "0.bias"]
    assert canonical_name("2._orig_mod.weight") == "2.weight"


def test_writes_are_seen_by_a_compiled_module():
    net = nn.Sequential(torch.compile(nn.Linear(3, 1), backend="eager"))
    net(torch.ones(1, 3))
    ParameterVector(net).write_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert net(torch.ones(1, 3)).item() == 10.0


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("heads.a.weight", ["heads"], True),
        ("heads.a.weight", ["heads.b"], False),
        ("headless.weight", ["head"], False),
        ("body.adapter.down", ["*.adapter.*"], True),
        ("body._orig_mod.head.weight", ["body.head"], True),
        ("weight", [], False),
    ],
)
def test_patterns_are_globs_or_modules(name, patterns, expected):
    assert is_excluded(name, patterns) is expected


@pytest.mark.parametrize("dtypes", [(FP64,), (BF16, FP64), (FP32,)])
def test_collected_gradient_is_the_sum_over_micro_batches(dtypes):
    net = make_net(*dtypes)

    def losses(net):
        return [net[2](net[:2](batch).to(dtypes[-1])).square().mean() for batch in batches(3, dtypes[0])]

    vector = ParameterVector(net)
    with vector.collect_gradient() as gradient:
        for loss in losses(net):
            loss.backward()
    parts = [flat_gradient(net, vector.tensors, lambda net, i=i: [losses(net)[i]]) for i in range(3)]
    assert gradient.dtype == vector.dtype
    torch.testing.assert_close(gradient, sum(part.to(vector.dtype) for part in parts), rtol=1e-6, atol=0)


def test_low_precision_gradients_are_added_in_fp32():
    net = nn.Linear(1, 1, bias=False).to(BF16)
    with ParameterVector(net).collect_gradient() as gradient:
        for slope in (256.0, 1.0, 1.0):  # 256 + 1 = 256 in bf16
            (slope * net.weight).sum().backward()
    assert gradient.item() == 258.0


def test_tied_weights_collect_the_gradients_of_both_uses():
    net = tied_net()
    vector = ParameterVector(net)
    with vector.collect_gradient() as gradient:
        net(batches(1)[0]).square().mean().backward()
    torch.testing.assert_close(
        gradient, flat_gradient(net, vector.tensors, lambda net: [net(batches(1)[0]).square().mean()])
    )


def test_unused_parameters_have_gradient_zero():
    net = make_net()
    with ParameterVector(net).collect_gradient() as gradient:
        net[0](batches(1)[0]).sum().backward()
    first, last = gradient.split([16, 10])
    assert first.abs().min() > 0
    assert torch.equal(last, torch.zeros(10))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(use_reentrant):
    net = make_net(FP64)
    inputs = batches(2, FP64).requires_grad_()
    vector = ParameterVector(net)
    with vector.collect_gradient() as gradient:
        for batch in inputs:
            net[2](checkpoint(net[:2], batch, use_reentrant=use_reentrant)).square().mean().backward()
    expected = flat_gradient(net, vector.tensors, lambda net: [net(batch).square().mean() for batch in inputs])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("exclude", [(), ("2",)])
@pytest.mark.parametrize("fails", [False, True])
def test_existing_gradients_are_put_back_untouched(exclude, fails):
    net = make_net()
    net(batches(1)[0]).sum().backward()
    net[0].bias.grad = None
    before = [parameter.grad for parameter in net.parameters()]
    values = [None if grad is None else grad.clone() for grad in before]
    vector = ParameterVector(net, exclude)
    try:
        with vector.collect_gradient() as gradient:
            net(batches(1)[0]).sum().backward()
            assert not fails
    except AssertionError:
        assert fails
    assert all(parameter.grad is grad for parameter, grad in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(grad, value) for grad, value in zip(before, values, strict=True) if grad is not None)
    # The hooks are gone, too.
    kept = gradient.clone()
    net(batches(1)[0]).sum().backward()
    assert torch.equal(gradient, kept)
    assert net[0].bias.grad is not None


def test_a_loss_that_reaches_no_parameter_is_an_error():
    net, other = make_net(), nn.Linear(3, 1)
    with (
        pytest.raises(ValueError, match=r"reached none of 4 parameters \(0.weight, 0.bias, 2.weight, ...\)"),
        ParameterVector(net).collect_gradient(),
    ):
        other(batches(1)[0]).sum().backward()


def test_gather_takes_a_superset_and_casts():
    vector = ParameterVector(make_net(BF16))
    stored = {name: torch.full(shape, 0.5, dtype=BF16) for name, shape in zip(vector.names, vector.shapes, strict=True)}
    gathered = vector.gather({**stored, "running_mean": torch.zeros(7)})
    assert torch.equal(gathered, torch.full((26,), 0.5))
    assert gathered.dtype == FP32


def test_gather_lists_all_mismatches_at_once():
    with pytest.raises(ValueError, match="differ in 3 places") as error:
        ParameterVector(make_net()).gather({"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(5)})
    for line in ("0.bias: (4,) in the", "2.weight: in the", "2.bias: in the"):
        assert line in str(error.value)


def test_shape_check_names_both_sides():
    size = torch.Size
    check_same_shapes({"a": size([2])}, {"a": size([2])}, "x", "y")
    with pytest.raises(ValueError, match="The x and the y model differ in 3 places") as error:
        check_same_shapes({"a": size([2]), "b": size([])}, {"a": size([3]), "c": size([])}, "x", "y")
    for line in ("b: in the x model only", "c: in the y model only", "a: (2,) in the x model, (3,) in the y model"):
        assert line in str(error.value)

import pytest
import torch
from adapted import Adapted, updates
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_odem.methods import METHODS, AverageMerge, MergeResult, TaskArithmeticMerge
from lightning_odem.parameters.adapter_combination import AdapterCombination
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.merging import merging
from lightning_odem.stream.stream import Stream

LINEAR = {name: rule for name, rule in METHODS.items() if rule.linear} | {
    "sum": lambda: TaskArithmeticMerge(recursion="sum")
}
WIDTH, RANK = 8192, 8


class Layer(nn.Module):
    """A weight without memory and a small adapter on it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH, device="meta"), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(RANK, WIDTH))
        self.lora_B = nn.Parameter(torch.zeros(WIDTH, RANK))
        self.scaling = 2.0


class Made(TorchDispatchMode):
    """Counts the bytes of all tensors that are made; there are never more at a time."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.bytes += sum(each.nbytes for each in tree_leaves(made) if torch.is_tensor(each) and not each.is_meta)
        return made


def tuned(module, base, seed):
    """The module's parameters after a training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator).to(value) if "lora_" in name else value
        for name, value in base.items()
    }


def merged_twice(method, **config):
    module = Adapted(**config)
    stream = Stream(method)
    stream.begin(module)
    records = [stream.merge(module, tuned(module, stream.state.base, seed), str(seed)) for seed in (1, 2, 3)]
    return updates(module), records


def average_with(module, merged, base):
    with merging(module, AverageMerge(), task="new", t=0.5, merged=merged, base=base, calibration=None):
        pass


@pytest.mark.parametrize("config", [{}, {"target_modules": ["embedding", "conv"]}], ids=["linear", "others"])
@pytest.mark.parametrize("name", LINEAR)
def test_combinations_are_cut_as_whole_updates_are(name, config):
    method = LINEAR[name]()
    found, records = merged_twice(method, **config)
    method.linear = False
    expected, others = merged_twice(method, **config)

    assert any(update.norm() > 0 for update in expected.values())
    for layer, update in expected.items():
        torch.testing.assert_close(found[layer], update, rtol=1e-4, atol=1e-5)
    for record, other in zip(records[1:], others[1:], strict=True):
        assert 0 < record.discarded == pytest.approx(other.discarded, rel=1e-3)


def test_a_merge_needs_memory_for_factors_only_however_large_the_base_is():
    made = {}
    for layers, others in ((4, 0), (4, 12)):
        module = nn.ModuleList([Layer() for _ in range(layers)])
        module.extend(nn.Linear(WIDTH, WIDTH, device="meta").requires_grad_(False) for _ in range(others))
        stream = Stream("average")
        stream.begin(module)
        tasks = [tuned(module, stream.state.base, seed) for seed in (1, 2)]
        with Made() as mode:
            for number, task in enumerate(tasks):
                stream.merge(module, task, f"task_{number}")
        made[others] = mode.bytes
    size = sum(parameter.numel() for parameter in module.parameters())
    adapter = sum(each.nbytes for each in module.parameters() if each.requires_grad)

    assert size > 1e9
    assert made[0] == made[12]
    assert made[12] < 60 * adapter < layers * WIDTH**2 * 4  # of both merges together


@pytest.mark.parametrize("broken", ["lora_A", "lora_B"])
def test_factors_that_are_not_finite_are_refused_and_the_module_stays(broken):
    module = Adapted()
    base = take_snapshot(module, lambda name: True)
    name = next(name for name, _ in module.named_parameters() if broken in name)
    module.get_parameter(name).data.flatten()[0] = torch.inf
    before = take_snapshot(module, lambda name: True)
    with pytest.raises(ValueError, match=r"infinite or NaN.*query"):
        average_with(module, base, base)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_a_merged_model_with_other_factors_is_refused_with_their_shapes():
    module = Adapted()
    base = take_snapshot(module, lambda name: True)
    merged = {name: tensor[..., :-1] if "query.lora_A" in name else tensor for name, tensor in base.items()}
    with pytest.raises(ValueError, match=r"\(3, 16\) in the incoming model, \(3, 15\) in the merged model"):
        average_with(module, merged, base)
    assert module.get_parameter(next(name for name in base if "query.lora_A" in name)).shape == (3, 16)


def test_a_subclass_with_a_rule_of_its_own_is_not_taken_for_linear():
    class Largest(AverageMerge):
        def merge(self, merged, incoming, t, context):
            return MergeResult(torch.where(merged.abs() > incoming.abs(), merged, incoming))

    class Named(AverageMerge):
        """Another name for the same rule."""

    assert not Largest.linear
    assert Named.linear


def test_a_rule_that_reads_further_models_is_not_linear():
    module = Adapted()
    models = [take_snapshot(module, lambda name: True) for _ in range(3)]
    adapters = AdapterCombination(module)
    adapters.expand()
    for model in models[:2]:
        adapters.updates(model)
    with pytest.raises(ValueError, match="Leave linear = False"):
        adapters.updates(models[2])

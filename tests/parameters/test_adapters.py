import pytest
import torch
from torch import nn

from lightning_odem.parameters.adapters import Adapters
from lightning_odem.parameters.vector import ParameterVector

peft = pytest.importorskip("peft")
from adapted import Adapted, best_approximation, updates  # noqa: E402

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"value": 5}, "alpha_pattern": {"value": 40}},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embedding", "query"]},
    "convolution": {"target_modules": ["conv"]},
    "saved": {"modules_to_save": ["classifier"]},
}


class Plain(nn.Module):
    """An adapted layer without peft."""

    def __init__(self, first, second, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 6), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(first)), nn.Parameter(torch.randn(second))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return x @ self.weight.T + self.scaling * x @ self.lora_A.T @ self.lora_B.T


def with_moved_adapters(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_computes_the_same_with_whole_updates(kind):
    module = with_moved_adapters(Adapted(**KINDS[kind]))
    ids = torch.randint(20, (8, 6))
    with torch.no_grad():
        before = module(ids)
        adapters = Adapters(module)
        adapters.expand()
        during = module(ids)
        adapters.restore()
        after = module(ids)

    assert adapters.pairs
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(after, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_updates_are_those_that_peft_computes(kind):
    module = with_moved_adapters(Adapted(**KINDS[kind]))
    expected = updates(module)
    adapters = Adapters(module)
    adapters.expand()
    vector = ParameterVector(module, adapters=adapters)
    found = dict(zip(vector.names, vector.views(vector.read()), strict=True))

    assert len(adapters.pairs) == len(expected)
    for name in adapters.pairs:
        layer = name.split(".lora_")[0]
        update = expected[layer].T if "embedding" in name else expected[layer]
        torch.testing.assert_close(found[name].double(), update, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_an_update_is_that_of_the_weight_it_is_added_to():
    module = with_moved_adapters(Adapted())
    ids, targets = torch.randint(20, (8, 6)), torch.arange(8) % 2
    layer = module.model.base_model.model.query
    layer.base_layer.weight.requires_grad_(True)
    module.training_step((ids, targets)).backward()
    expected = layer.base_layer.weight.grad
    layer.base_layer.weight.requires_grad_(False)
    module.zero_grad()

    adapters = Adapters(module)
    adapters.expand()
    vector = ParameterVector(module, adapters=adapters)
    with vector.collect_gradient() as gradient:
        module.training_step((ids, targets)).backward()

    name = next(name for name in vector.names if "query" in name)
    torch.testing.assert_close(vector.views(gradient)[vector.names.index(name)], expected, rtol=1e-4, atol=1e-6)


def test_factors_of_an_unchanged_update_come_back_bit_by_bit():
    module = with_moved_adapters(Adapted())
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    adapters = Adapters(module)
    adapters.expand()
    vector = ParameterVector(module, adapters=adapters)
    theta = dict(zip(vector.names, vector.views(vector.read()), strict=True))

    assert adapters.contract(theta, theta) == ({}, 0.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_an_excluded_adapter_is_left_alone():
    pairs = Adapters(Adapted(), ["*value*"]).pairs
    assert [name.split(".")[-4] for name in pairs] == ["query"]


def test_a_pair_of_which_one_factor_is_frozen_is_merged_by_the_other():
    module = Adapted()
    for name, parameter in module.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert Adapters(module).pairs == {}


@pytest.mark.parametrize(
    "scale", [{"scaling": 0.5}, {"scale": 0.5}, {"lora_alpha": 1, "r": 2}, {"alpha": 1, "rank": 2}]
)
def test_a_plain_module_says_its_scale(scale):
    assert Adapters(Plain((2, 6), (4, 2), **scale)).pairs["lora_A"].scale == 0.5


def test_a_plain_module_computes_the_same_with_whole_updates():
    module, x = Plain((2, 6), (4, 2), scaling=0.3), torch.randn(5, 6)
    before = module(x)
    Adapters(module).expand()
    torch.testing.assert_close(module(x), before)


def test_a_layer_in_two_places_has_one_adapter():
    layer = Plain((2, 6), (4, 2), scaling=0.5)
    module, x = nn.ModuleList([layer, layer]), torch.randn(5, 6)
    before = module[1](x)
    adapters = Adapters(module)
    adapters.expand()
    assert list(adapters.pairs) == ["0.lora_A"]
    torch.testing.assert_close(module[1](x), before)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Plain((2, 6), (4, 2)), "no attribute scaling"),
        (Plain((2, 6), (4, 2), scaling=nn.Parameter(torch.ones(1))), "no attribute scaling"),
        (Plain((2, 6), (4, 2), scaling=0.0), "other than 0"),
        (Plain((4, 6), (4, 2), scaling=1.0), "are no factors"),
    ],
    ids=["unknown", "learned", "zero", "shapes"],
)
def test_a_pair_that_is_not_understood_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        Adapters(module)


def test_a_factor_shared_by_layers_is_refused():
    module = nn.ModuleList([Plain((2, 6), (4, 2), scaling=1.0) for _ in range(2)])
    module[1].lora_A = module[0].lora_A
    with pytest.raises(ValueError, match="factor of two updates"):
        Adapters(module)


def test_half_of_a_pair_cannot_be_excluded():
    with pytest.raises(ValueError, match="Exclude both or none"):
        Adapters(Adapted(), ["*lora_B*"])


def test_an_adapter_folded_into_the_base_is_refused():
    module = Adapted()
    module.model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        Adapters(module)


def test_several_adapters_trained_at_once_are_refused():
    module = Adapted()
    module.model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query", "value"]))
    assert all("default" in name for name in Adapters(module).pairs)  # one of them is trained
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(ValueError, match="several adapters at once"):
        Adapters(module)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.LoHaConfig(r=2, target_modules=["query"]), "LoHa"),
        (peft.LoKrConfig(r=2, target_modules=["query"]), "LoKr"),
        (peft.OFTConfig(r=2, oft_block_size=0, target_modules=["query"]), "OFT"),
        (peft.VeraConfig(r=2, target_modules=["query"]), "VeRA"),
        (peft.AdaLoraConfig(init_r=2, target_modules=["query"], total_step=5), "AdaLoRA"),
    ],
    ids=["loha", "lokr", "oft", "vera", "adalora"],
)
def test_adapters_whose_update_is_no_product_of_two_factors_are_refused(config, kind):
    module = peft.get_peft_model(nn.ModuleDict({"query": nn.Linear(8, 8)}), config)
    with pytest.raises(ValueError, match=f"{kind} adapter"):
        Adapters(module)


def test_squared_gradients_of_an_update_follow_from_those_of_its_factors():
    torch.manual_seed(0)
    module = Plain((40, 600), (500, 40), scaling=0.7)
    rows, columns = torch.rand(500, dtype=torch.float64), torch.rand(600, dtype=torch.float64)
    first, second = module.lora_A.detach().double(), module.lora_B.detach().double()
    squares = {  # of independent entries with the variances rows x columns
        "lora_A": 0.7**2 * columns * (second.square().T @ rows)[:, None],
        "lora_B": 0.7**2 * rows[:, None] * (first.square() @ columns),
    }
    adapters = Adapters(module)
    adapters.expand()

    found = adapters.squared_gradients(squares)["lora_A"]

    torch.testing.assert_close(found, rows[:, None] * columns, rtol=1e-6, atol=0.0)


def test_a_module_is_at_the_point_that_its_adapters_can_hold_and_so_is_the_gradient():
    module = with_moved_adapters(Adapted())
    adapters = Adapters(module)
    adapters.expand()
    vector = ParameterVector(module, adapters=adapters)
    theta = torch.randn(len(vector), generator=torch.Generator().manual_seed(0))
    vector.write_(theta)
    found, wanted = vector.views(vector.read()), vector.views(theta)
    with vector.collect_gradient() as gradient:
        module.training_step((torch.randint(20, (8, 6)), torch.arange(8) % 2)).backward()

    for name, at, update, slope in zip(vector.names, found, wanted, vector.views(gradient), strict=True):
        if name in adapters.pairs:
            torch.testing.assert_close(at, best_approximation(update, 3), rtol=1e-3, atol=1e-4)
            left, _, right = torch.linalg.svd(at)
            # Nothing of it is beyond the directions of both factors.
            assert (left[:, 3:].T @ slope @ right[3:].T).norm() < 1e-4 * slope.norm()

import pytest
import torch
from torch import nn

from lightning_odem.parameters.frozen_base import (
    changed,
    check_frozen_base,
    digest,
    frozen_base,
    keep_frozen_when_loading,
    without_frozen,
)

pytest.importorskip("peft")
from adapted import Adapted  # noqa: E402


def test_a_module_without_adapters_has_no_frozen_base():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    assert frozen_base(net, []) == {}


def test_the_frozen_base_is_all_that_is_not_trained_with_the_adapters():
    module = Adapted(modules_to_save=["classifier"])
    digests = frozen_base(module, ["*.norm.*"])
    trained = {name for name, each in module.named_parameters() if each.requires_grad}
    excluded = {name for name, _ in module.named_parameters() if ".norm." in name}
    assert digests.keys() == {name for name, _ in module.named_parameters()} - trained - excluded
    assert not changed(module, digests)


def test_the_base_of_an_excluded_adapter_is_not_kept_either():
    digests = frozen_base(Adapted(), ["*.conv*", "*query.base_layer*"])
    assert any("query.base_layer" in name for name in digests)
    assert not any("conv" in name for name in digests)


def test_factors_that_are_frozen_belong_to_the_base():
    module = Adapted()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    assert any("lora_A" in name for name in frozen_base(module, []))


def test_another_value_is_told():
    module = Adapted()
    digests = frozen_base(module, [])
    with torch.no_grad():
        module.model.base_model.model.norm.weight[0] += 1e-6
    assert changed(module, digests) == ["model.base_model.model.norm.weight"]
    with pytest.raises(ValueError, match=r"another frozen base .* 1 of \d+ tensors differ .*norm\.weight"):
        check_frozen_base(module, digests)


def test_a_module_of_higher_precision_has_the_base_that_was_rounded():
    digests = frozen_base(Adapted().bfloat16(), [])
    assert not changed(Adapted(), digests)
    assert changed(Adapted(seed=1), digests)


def test_a_meta_tensor_has_a_fingerprint_of_its_shape():
    assert digest(torch.empty(2, device="meta")) == digest(torch.empty(2, device="meta"))
    assert digest(torch.empty(2, device="meta")) != digest(torch.empty(3, device="meta"))


def test_a_tensor_that_consists_of_others_has_a_fingerprint_of_them():
    class Quantised(torch.Tensor):
        @staticmethod
        def __new__(cls, values, scale):
            self = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
            self.values_, self.scale_ = values, scale
            return self

        def __tensor_flatten__(self):
            return ["values_", "scale_"], None

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.detach.default:
                return Quantised(args[0].values_, args[0].scale_)
            raise NotImplementedError(function)

    one, two = torch.ones(2, dtype=torch.int8), torch.tensor(0.5)
    assert digest(Quantised(one, two)) == digest(Quantised(one.clone(), two.clone()))
    assert digest(Quantised(one, two)) != digest(Quantised(one, 2 * two))


def test_a_state_dict_without_the_frozen_base_is_completed_from_the_module():
    module, digests = Adapted(), frozen_base(Adapted(), [])
    left = without_frozen(module, module.state_dict(), digests)
    assert left.keys() == {name for name, each in module.named_parameters() if each.requires_grad}
    other = Adapted()
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(left)
    keep_frozen_when_loading(other, digests)
    keep_frozen_when_loading(other, digests)  # as at every fit
    other.load_state_dict(left)
    assert len(other._load_state_dict_pre_hooks) == 1

    another = Adapted(seed=1)
    keep_frozen_when_loading(another, digests)
    with pytest.raises(ValueError, match="another frozen base"):
        another.load_state_dict(left)


def test_tied_weights_are_left_out_under_both_names():
    module = Adapted()
    module.output = nn.Linear(16, 20, bias=False)
    module.output.weight = module.model.base_model.model.embedding.weight
    left = without_frozen(module, module.state_dict(), frozen_base(module, []))
    assert "output.weight" not in left

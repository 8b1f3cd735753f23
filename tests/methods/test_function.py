import pickle

import pytest
import torch
from toy import Classifier, Incoming, Task, fit, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods import (
    METHODS,
    AverageMerge,
    FunctionMerge,
    MergeContext,
    MergeMethod,
    MergeResult,
    method_name,
    register_method,
    resolve_method,
)
from lightning_odem.methods.needs import BaseModel


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A registry of its own for each test."""
    methods = METHODS.copy()
    monkeypatch.setattr("lightning_odem.methods.registry.METHODS", methods)
    return methods


def towards_base(merged, incoming, t, context):
    return merged.lerp_(incoming, t).add_(context[BaseModel])


def context(size=2):
    return MergeContext(["w"], [(size,)], needed={BaseModel: torch.ones(size)})


def test_a_function_becomes_a_method_under_its_name():
    assert register_method("my_rule")(towards_base) is towards_base
    method = resolve_method("my_rule")
    assert isinstance(method, FunctionMerge)
    assert method_name(method) == "my_rule"
    assert method.merge(torch.zeros(2), torch.ones(2), 0.25, context()).theta.tolist() == [1.25, 1.25]
    incoming = torch.ones(2)
    assert method.start(incoming, context()).theta is incoming


def test_the_callback_merges_with_a_function_under_its_name(small_stream):
    module, incoming = Classifier(), Incoming()
    base = weights(module)
    register_method("my_rule")(towards_base)
    merge = ContinualMergeCallback(method="my_rule")
    for number in range(2):
        fit(module, Task(number), incoming, merge)
    assert [record.method for record in merge.report.merges] == ["my_rule"] * 2
    first, second = incoming.models
    for name, tensor in weights(module).items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2 + base[name])


def test_a_class_becomes_a_method_under_its_name():
    @register_method("overwrite")
    class Overwrite(MergeMethod):
        def merge(self, merged, incoming, t, context):
            return MergeResult(incoming)

    method = resolve_method("overwrite")
    assert type(method) is Overwrite
    assert method_name(method) == "overwrite"


def test_a_function_without_a_name_in_the_registry_goes_by_its_own():
    assert method_name(FunctionMerge(towards_base)) == "towards_base"


def test_a_name_is_given_once(registry):
    register_method("my_rule")(towards_base)
    for name, taken in (("my_rule", "towards_base"), ("average", "AverageMerge")):
        with pytest.raises(ValueError, match=f"merge method '{name}' already, {taken}"):
            register_method(name)(AverageMerge)
    assert registry["my_rule"] is towards_base


@pytest.mark.parametrize("rule", [3, int, AverageMerge()])
def test_only_methods_and_functions_are_registered(rule):
    with pytest.raises(TypeError, match="subclass of MergeMethod or a function"):
        register_method("odd")(rule)


def test_a_function_is_not_called_at_time_0():
    def fail(merged, incoming, t, context):
        raise AssertionError

    merged = torch.zeros(2)
    assert FunctionMerge(fail).merge(merged, torch.ones(2), 0.0, context()).theta is merged


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(3), r"rule must return the merged weights, shape \(2,\), but gave a tensor of shape \(3,\)"),
        (None, "rule must return the merged weights.* but gave None"),
    ],
)
def test_a_function_returns_the_merged_weights(returned, message):
    def rule(merged, incoming, t, context):
        return returned

    with pytest.raises(ValueError, match=message):
        FunctionMerge(rule).merge(torch.zeros(2), torch.ones(2), 0.5, context())


def test_a_function_given_by_name_survives_pickling():
    """As when processes are spawned with the callback that holds it."""
    copy = pickle.loads(pickle.dumps(FunctionMerge(torch.maximum)))
    assert copy.function is torch.maximum

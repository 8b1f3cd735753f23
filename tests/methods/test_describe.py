import inspect
import json

import pytest

from lightning_odem.methods import (
    METHODS,
    FunctionMerge,
    HCMMMerge,
    LinearInterpolation,
    MergeMethod,
    Minibatches,
    ODEMerge,
    PaperODEMerge,
    TaskArithmeticMerge,
    resolve_method,
)
from lightning_odem.methods.describe import describe_method


def stay(merged, incoming, t, context):
    return merged


def go(merged, incoming, t, context):
    return incoming


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_describes_itself_as_plain_data(name):
    description = describe_method(resolve_method(name))
    assert description["name"] == name
    assert json.loads(json.dumps(description)) == json.loads(json.dumps(describe_method(resolve_method(name))))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_argument_is_in_the_description(name):
    method = resolve_method(name)
    parameters = inspect.signature(type(method)).parameters.values()
    assert describe_method(method).keys() == {"name", *(one.name for one in parameters)}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (PaperODEMerge(0.1), PaperODEMerge(0.2)),
        (PaperODEMerge(0.1), PaperODEMerge(0.1, "heun")),
        (PaperODEMerge(operating_time=0.5), PaperODEMerge(operating_time="search")),
        (PaperODEMerge(), PaperODEMerge(minibatches=Minibatches(64))),
        (ODEMerge(), PaperODEMerge()),
        (LinearInterpolation(0.1), LinearInterpolation(0.2)),
        (TaskArithmeticMerge(0.5, "sum"), TaskArithmeticMerge(0.5, "utility")),
        (HCMMMerge(0.1), HCMMMerge(0.2)),
        (FunctionMerge(stay), FunctionMerge(go)),
    ],
)
def test_other_settings_give_another_description(first, second):
    assert describe_method(first) != describe_method(second)


def test_a_method_within_a_method_is_described_too():
    class Around(MergeMethod):
        def __init__(self, method):
            self.method = method

        def merge(self, merged, incoming, t, context):
            return self.method.merge(merged, incoming, t, context)

    description = describe_method(Around(LinearInterpolation(0.1)))
    assert description["method"] == {"name": "interpolation", "coefficient": 0.1}

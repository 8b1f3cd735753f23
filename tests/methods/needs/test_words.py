"""Needs as they were declared and read until version 0.5."""

import warnings

import pytest
import torch
from toy import Classifier, Task, fit

from lightning_odem import ContinualMergeCallback, MergeMethod, MergeResult
from lightning_odem.methods import (
    METHODS,
    BaseModel,
    Calibration,
    MergeContext,
    Snapshots,
    register_method,
    resolve_method,
)
from lightning_odem.methods.needs import InputMoments, SecondMoments, TrainingData


class Earlier(MergeMethod):
    needs = frozenset({"snapshots", "calibration", "base"})
    snapshots = 4

    def merge(self, merged, incoming, t, context):
        self.seen = context.base, context.calibration, context.snapshots
        return MergeResult(incoming)


def test_words_become_needs_with_a_warning_that_says_how_to_write_them():
    with pytest.warns(DeprecationWarning, match=r"needs = \(BaseModel\(\), Calibration\(\), Snapshots\(4\)\)"):
        method = resolve_method(Earlier())
    assert method.needs == (BaseModel(), Calibration(), Snapshots(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_method(method)


def test_a_method_with_words_merges_and_is_told_how_to_read_the_context(small_stream):
    with pytest.warns(DeprecationWarning, match="needs = "):
        merge = ContinualMergeCallback(method := Earlier())
    module = Classifier()
    fit(module, Task(0), merge)
    with pytest.warns(DeprecationWarning, match=r"context\.base goes .* write: context\[BaseModel\]"):
        fit(module, Task(1), merge)
    base, objective, snapshots = method.seen
    assert torch.equal(base, torch.cat([tensor.flatten() for tensor in merge._state.base.values()]))
    assert objective.buffer.counts == {"task_1": 24, "task_2": 24}
    assert len(snapshots) == 2


@pytest.mark.parametrize(("word", "empty"), [("base", None), ("input_moments", {}), ("snapshots", ())])
def test_a_field_of_a_need_that_was_not_declared_is_empty(word, empty):
    with pytest.warns(DeprecationWarning, match=f"context.{word}"):
        assert getattr(MergeContext([], []), word) == empty


def test_what_never_was_a_field_is_none():
    with pytest.raises(AttributeError, match="'MergeContext' object has no attribute 'bases'"):
        _ = MergeContext([], []).bases


def test_functions_are_registered_with_words(monkeypatch):
    monkeypatch.setattr("lightning_odem.methods.registry.METHODS", METHODS.copy())
    with pytest.warns(DeprecationWarning, match=r"needs = \(BaseModel\(\), InputMoments\(\), TrainingData\(\)\)"):
        register_method("rule", needs=["input_moments", "task_data"])(lambda merged, incoming, t, context: merged)
    assert resolve_method("rule").needs == (BaseModel(), InputMoments(), TrainingData())


def test_a_class_stands_for_a_need_without_arguments_and_one_needs_no_tuple():
    method = Earlier()
    method.needs = (BaseModel, SecondMoments())
    assert resolve_method(method).needs == (BaseModel(), SecondMoments())
    method.needs = Snapshots(3)
    assert resolve_method(method).needs == (Snapshots(3),)


@pytest.mark.parametrize("needs", [("bases",), (3,), (int,), "bases"])
def test_what_is_no_need_is_refused(needs):
    method = Earlier()
    method.needs = needs
    with pytest.raises(ValueError, match=r"a method can need objects such as BaseModel\(\), Calibration\(\)"):
        resolve_method(method)


def test_a_context_can_be_made_with_the_earlier_fields():
    base = torch.ones(2)
    with pytest.warns(DeprecationWarning, match=r"write: MergeContext\(\.\.\., \{BaseModel: base\}\)"):
        context = MergeContext(["w"], [(2,)], base=base)
    assert context[BaseModel] is base
    with pytest.warns(DeprecationWarning, match="goes with version 0.8"):
        assert MergeContext(["w"], [(2,)], base)[BaseModel] is base
    with pytest.warns(DeprecationWarning, match="goes with version 0.8"):
        assert BaseModel not in MergeContext(["w"], [(2,)], base=None)

import pytest
import torch

from lightning_odem.methods import MergeContext
from lightning_odem.methods.running_average import RunningAverage


def test_a_parameter_new_to_the_merge_begins_where_the_merged_model_has_it():
    average, both = RunningAverage(), MergeContext(["b", "a"], [(1,), (2,)])
    average.start(torch.zeros(2), MergeContext(["a"], [(2,)]))
    assert average.write_(torch.tensor([3.0, 4.0, 5.0]), both).tolist() == [3.0, 0.0, 0.0]
    average.move(torch.tensor([5.0, 1.0, 1.0]), 0.5, both)
    assert {name: value.tolist() for name, value in average.state_dict()["average"].items()} == {
        "a": [0.5, 0.5],
        "b": [4.0],
    }
    average.move(torch.ones(1), 1.0, MergeContext(["b"], [(1,)]))
    assert average.state_dict()["average"]["a"].tolist() == [0.5, 0.5]


def test_an_average_of_another_shape_is_refused_and_nothing_changed():
    average = RunningAverage()
    average.start(torch.zeros(4), MergeContext(["a"], [(2, 2)]))
    with pytest.raises(ValueError, match=r"has a in shape \(2, 2\), the model in \(4,\)"):
        average.write_(merged := torch.ones(4), MergeContext(["a"], [(4,)]))
    assert merged.tolist() == [1.0] * 4


def test_each_tensor_is_kept_by_itself():
    average = RunningAverage()
    average.start(torch.arange(6.0), MergeContext(["a", "b"], [(2, 2), (2,)]))
    for tensor in average.state_dict()["average"].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes

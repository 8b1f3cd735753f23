import lightning as L
import pytest
import torch
from torch import nn

from lightning_odem.classifiers.classifier import TaskClassifier
from lightning_odem.stream.restoration import is_ready, restore_task_parameters

OWN = {"heads.digits.weight": torch.full((3, 4), 2.0), "heads.digits.bias": torch.full((3,), 3.0)}


def test_heads_that_a_new_module_lacks_are_made():
    module = TaskClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), mean=[0.5] * 3, std=[0.5] * 3)
    restore_task_parameters(module, OWN)
    assert {name: value.tolist() for name, value in module.heads.named_parameters()} == {
        name.removeprefix("heads."): value.tolist() for name, value in OWN.items()
    }


def test_parameters_that_are_there_are_only_written():
    class Counting(nn.Linear):
        calls = 0

        def on_load_checkpoint(self, checkpoint):
            self.calls += 1

    module = Counting(2, 1)
    restore_task_parameters(module, {"bias": torch.tensor([5.0])})
    assert (module.bias.item(), module.calls) == (5.0, 0)


def test_a_module_that_cannot_make_them_is_told_how():
    module = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"keep heads.digits.weight, heads.digits.bias for them.*Linear does not have"):
        restore_task_parameters(module, OWN)


def test_a_head_of_another_size_takes_the_place_of_the_modules():
    module = nn.Linear(2, 1)
    restore_task_parameters(module, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
    assert module(torch.ones(2)).tolist() == [2.0, 2.0, 2.0]


class Plain(L.LightningModule):
    def __init__(self, bias=True):
        super().__init__()
        self.body = nn.Linear(2, 1, bias)
        self.register_buffer("mean", torch.zeros(1))


class Making(Plain):
    def on_load_checkpoint(self, checkpoint):
        pass


def test_a_module_is_ready_once_it_has_all_parameters_and_buffers_with_values():
    shared, own = ["body.weight", "mean"], ["body.bias"]
    assert is_ready(Plain(), shared, own)
    assert not is_ready(Plain(), [*shared, "head.weight"], own)
    assert not is_ready(Plain(bias=False), shared, own)
    assert is_ready(Making(bias=False), shared, own)
    assert not is_ready(Plain().to("meta"), shared, own)
    assert not is_ready(Plain(bias=False).to("meta"), [], [])

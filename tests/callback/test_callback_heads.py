"""Parameters that each task keeps for itself are in place whenever its samples are looked at."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import Classifier, Incoming, Task, everything, fit, same

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods import ODEMerge, PaperODEMerge, ReplayMerge

pytestmark = pytest.mark.usefixtures("small_stream")

METHODS = [ODEMerge(), PaperODEMerge(operating_time="search"), PaperODEMerge(operating_time="became"), ReplayMerge()]


class OneHead(Classifier):
    """One head, excluded from merges; each task begins with a fresh one."""

    def begin(self, number, classes=3):
        torch.manual_seed(number)
        self.head = nn.Linear(8, classes)


class LooksUp(OneHead):
    """The same, but its calibration loss looks up the head of a sample's task by itself."""

    kept = None

    def calibration_step(self, batch, task):
        now = [self.head.weight, self.head.bias]
        weight, bias = self.kept.get(task, now)
        return F.cross_entropy(F.linear(self.body(batch[0]), weight, bias), batch[1])


def stream(module, method, **options):
    merge = ContinualMergeCallback(method, exclude=["head"], **options)
    module.kept = {}
    for number in range(3):
        module.begin(number)
        fit(module, Task(number), merge)
        module.kept = {
            f"task_{number + 1}": [module.head.weight.detach().clone(), module.head.bias.detach().clone()]
        } | module.kept
    return merge


@pytest.mark.parametrize("method", METHODS, ids=["ode", "search", "became", "replay"])
def test_samples_of_earlier_tasks_go_through_their_own_heads(method):
    module, reference = OneHead(), LooksUp()
    reference.load_state_dict(module.state_dict())
    merge, expected = stream(module, method), stream(reference, method)
    assert same(everything(module), everything(reference))
    assert merge.report.merges[2].loss_before == pytest.approx(expected.report.merges[2].loss_before, nan_ok=True)


@pytest.mark.parametrize("method", ["average", "ode"])
@pytest.mark.parametrize("batch_norm", ["average", "recalibrate"])
def test_heads_may_have_other_sizes_from_task_to_task(method, batch_norm, small_stream):
    merge, module = (
        ContinualMergeCallback(method, exclude=["head"], batch_norm=batch_norm, dirpath="heads"),
        OneHead(batch_norm=True),
    )
    for number, classes in enumerate([3, 5, 4]):
        module.begin(number, classes)
        fit(module, Task(number), merge)
    assert module.head.weight.shape == (4, 8)
    assert len(merge.report.accuracy[2]) == 3
    # In another process too, whose module has the head of another task.
    again, other = (
        ContinualMergeCallback(method, exclude=["head"], dirpath="heads"),
        OneHead(batch_norm=True, classes=7),
    )
    for number, classes in enumerate([3, 5, 4]):
        again.load_task(other, f"task_{number + 1}")
        assert other.head.weight.shape == (classes, 8)
        with torch.no_grad():
            found = other.eval()(Task(number).test_set.tensors[0]).argmax(1) == Task(number).test_set.tensors[1]
        assert found.double().mean().item() == pytest.approx(merge.report.accuracy[2][number])


class Counts(OneHead):
    """Its loss depends on how many classes it believes to have, as those of language models on their vocabulary."""

    classes = 3

    def calibration_step(self, batch, task):
        return F.cross_entropy(self(batch[0]).reshape(-1, self.classes), batch[1])

    def prediction_step(self, batch, task):
        return self(batch[0]).reshape(-1, self.classes), batch[1]


@pytest.mark.parametrize("method", ["average", "ode"])
def test_a_module_that_cannot_use_an_earlier_tasks_head_any_more_is_refused_before_training(method):
    merge, module, incoming = ContinualMergeCallback(method, exclude=["head"]), Counts(), Incoming()
    module.begin(0)
    fit(module, Task(0), merge)
    module.begin(1, classes=5)
    module.classes = 5
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size|float32 \[3, 5\]"):
        fit(module, Task(1), incoming, merge)
    assert incoming.batches <= 1
    assert merge.report.tasks == ["task_1"]

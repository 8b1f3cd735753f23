import itertools
from collections import Counter, defaultdict, deque

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_odem.parameters.attributes import Attributes, ReadAhead
from lightning_odem.parameters.snapshot import undisturbed


class Step(nn.Module):
    """Keeps everything that training steps keep."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.losses, self.seen, self.name = [1.0], 3, "a"
        self.outputs = {"train": [], "val": [[1]]}
        self.recent, self.kinds, self.counts, self.by_kind = deque([1], 3), {1}, Counter("a"), defaultdict(list)
        self.mean, self.loose = MeanMetric(), [MeanMetric()]
        self.scores = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])
        self.average = torch.zeros(2)
        self.more = iter(DataLoader(range(6), 2))
        self.inner = nn.Module()
        self.inner.calls = 0

    def forward(self):
        loss = self.net(torch.ones(2)).sum()
        self.losses.append(loss)
        self.seen += 1
        self.name, self.new = "b", loss
        self.outputs["train"].append(loss)
        self.outputs["val"][0].append(2)
        self.outputs["other"] = 1
        self.recent.extend("xyz")
        self.kinds.add(2)
        self.counts["a"] += 1
        self.by_kind["a"].append(1)
        self.mean.update(loss.detach())
        self.loose[0].update(1.0)
        self.scores.update(torch.tensor([0, 1]), torch.tensor([0, 2]))
        self.average += 1
        self.inner.calls += 1
        return next(self.more).tolist()

    def state(self):
        plain = (self.losses, self.seen, self.name, self.outputs, self.recent, self.kinds, self.counts, self.by_kind)
        metrics = (self.mean.update_count, self.loose[0].update_count, self.mean.mean_value, self.loose[0].mean_value)
        return str((*plain, *metrics, self.average, self.inner.calls, hasattr(self, "new"), self.scores.compute()))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("before", [False, True])
def test_a_block_leaves_no_trace_in_attributes_metrics_and_iterators(before, steps):
    module = Step()
    module.scores.update(torch.tensor([0]), torch.tensor([0]))
    if before:
        assert module() == [0, 1]
        del module.new
    state, objects = module.state(), [module.losses, module.outputs["train"], module.recent, module.kinds]
    with undisturbed(module):
        for _ in range(steps - before):
            module()
    assert module.state() == state
    now = [module.losses, module.outputs["train"], module.recent, module.kinds]
    assert list(map(id, now)) == list(map(id, objects))
    rest = [batch.tolist() for batch in module.more]
    assert rest == [[0, 1], [2, 3], [4, 5]][int(before) :]


def test_a_metric_goes_on_from_its_state():
    module = Step()
    module.mean.update(2.0)
    with undisturbed(module):
        module.mean.update(100.0)
        module.mean.reset()
    module.mean.update(4.0)
    assert module.mean.compute() == 3.0


def test_metrics_that_share_their_state_still_do():
    module = Step()
    for _ in range(3):
        module.scores.update(torch.tensor([0]), torch.tensor([0]))
        with undisturbed(module):
            module.scores.update(torch.tensor([0]), torch.tensor([1]))
    assert {name: value.item() for name, value in module.scores.compute().items()} == {
        "MulticlassAccuracy": 1.0,
        "MulticlassF1Score": 1.0,
    }


def test_a_metric_updated_in_inference_mode_is_put_back():
    module = Step()
    with torch.inference_mode():
        module.mean.update(2.0)
    with undisturbed(module):
        module.mean.update(4.0)
    assert module.mean.compute() == 2.0


def test_tensors_without_copies_keep_what_was_done_to_them():
    module = Step()
    attributes = Attributes([module], tensors=False)
    module()
    attributes.put_back()
    assert module.losses == [1.0]
    assert module.average.tolist() == [1, 1]


def test_a_list_that_holds_itself_is_put_back():
    module = Step()
    module.losses.append(module.losses)
    with undisturbed(module):
        module.losses.clear()
    assert module.losses[1] is module.losses


def test_an_iterator_that_nobody_read_is_the_same_object():
    module = Step()
    before = module.more
    with undisturbed(module):
        assert module.more._num_yielded == 0  # as of the iterator itself
    assert module.more is before


def test_reading_ahead_a_thousand_times_reads_the_source_once():
    module, source = nn.Module(), itertools.count()
    module.numbers = source
    for _ in range(1000):
        with undisturbed(module):
            attributes = Attributes([module])
            assert [next(module.numbers), next(module.numbers)] == [0, 1]
            attributes.put_back()
    assert next(source) == 2
    assert [next(module.numbers) for _ in range(2)] == [0, 1]
    assert isinstance(module.numbers, ReadAhead)


def test_an_iterator_made_anew_at_its_end_is_put_back():
    module = nn.Module()
    module.numbers = iter([1, 2])
    with undisturbed(module):
        list(module.numbers)
        module.numbers = iter([5])
    assert list(module.numbers) == [1, 2]

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toy import Classifier, Task, Watching, fit

from lightning_odem import ContinualMergeCallback
from lightning_odem.stream.trace import Epochs
from lightning_odem.tasks.task import EpochSampler

pytestmark = pytest.mark.usefixtures("small_stream")


class WithAdam(Classifier):
    optimizer = torch.optim.Adam

    def configure_optimizers(self):
        self.used = self.optimizer(self.parameters(), 0.01)
        return self.used


def test_nothing_is_collected_for_a_method_that_needs_nothing():
    method = Watching()
    merge = ContinualMergeCallback(method=method)
    fit(WithAdam(), Task(0), merge)
    assert method.contexts[0].needed == {}


def test_epochs_are_counted_from_zero_whatever_the_loader_was_used_for():
    dataset = TensorDataset(torch.arange(10))

    def loader():
        return DataLoader(dataset, batch_size=3, sampler=EpochSampler(dataset, seed=1))

    used = loader()
    used.sampler.set_epoch(5)
    list(used)
    first, second = Epochs(used), Epochs(loader())
    passes = [[torch.cat([batch[0] for batch in epochs]).tolist() for _ in range(2)] for epochs in (first, second)]
    assert passes[0] == passes[1]
    assert passes[0][0] != passes[0][1]
    assert len(list(Epochs(loader(), 2))) == 2

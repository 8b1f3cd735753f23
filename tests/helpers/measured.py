"""Modules and tasks that are measured by something else than accuracy."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    """A small network whose loss is given."""

    def __init__(self, outputs=1, loss=F.mse_loss, squeeze=False, lr=0.05):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))
        self.loss, self.squeeze, self.lr = loss, squeeze, lr

    def forward(self, inputs):
        return self.net(inputs).squeeze(-1) if self.squeeze else self.net(inputs)

    def training_step(self, batch, batch_idx):
        outputs = self(batch[0])
        return self.loss(outputs, batch[1].reshape(outputs.shape).float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Data(L.LightningDataModule):
    """Inputs of a task's own and what a function makes of them."""

    def __init__(self, number, target, metric=None, batch_size=8):
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(36, 4, generator=generator) + number
        targets = target(inputs - number)
        self.train_set, self.test_set = (
            TensorDataset(inputs[:24], targets[:24]),
            TensorDataset(inputs[24:], targets[24:]),
        )
        self.batch_size = batch_size
        if metric is not None:
            self.task_metric = metric

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test_set, batch_size=5)


class Tokens(L.LightningModule):
    """Predicts the token at each place from the token there: outputs [B, T, V]."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))

    def forward(self, tokens):
        return self.net(tokens)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


class Texts(Data):
    """Sequences in which each token is followed by one that the task decides."""

    def __init__(self, number):
        L.LightningDataModule.__init__(self)
        tokens = torch.randint(5, (36, 6), generator=torch.Generator().manual_seed(number))
        targets = (tokens + number) % 5
        self.train_set, self.test_set = (
            TensorDataset(tokens[:24], targets[:24]),
            TensorDataset(tokens[24:], targets[24:]),
        )
        self.batch_size = 8


def total(inputs):
    """The target of a regression."""
    return inputs.sum(1)


def positive(inputs):
    """A class as the losses of one logit want it."""
    return (inputs.sum(1) > 0).float()


def labels(inputs):
    """Three labels that do not exclude each other."""
    return (inputs[:, :3] > 0).float()

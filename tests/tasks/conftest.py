from collections.abc import Callable

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.nn import functional as F

from lightning_odem.tasks import ArrayDataset, Splits, Task


class Recorder(LightningModule):
    """A linear classifier of the mean brightness that keeps the batches it was trained on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 10)
        self.seen = []

    def _loss(self, batch):
        images, labels = batch
        return F.cross_entropy(self.layer(images.float().mean(dim=(1, 2, 3)).unsqueeze(1) / 255), labels)

    def training_step(self, batch):
        self.seen.append(batch)
        return self._loss(batch)

    def validation_step(self, batch):
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch):
        self.log("test_loss", self._loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture
def fit(tmp_path) -> Callable[[LightningDataModule], Recorder]:
    """Fit and test a fresh Recorder with fast_dev_run."""

    def run(datamodule):
        model = Recorder()
        trainer = Trainer(fast_dev_run=2, accelerator="cpu", enable_progress_bar=False, default_root_dir=tmp_path)
        trainer.fit(model, datamodule=datamodule)
        trainer.test(model, datamodule=datamodule, verbose=False)
        return model

    return run


def ramp(count: int, first: int = 0) -> ArrayDataset:
    """Sample i is a 4x4 image of the value ``first + i`` with label i mod 2."""
    values = np.arange(first, first + count, dtype=np.uint8)
    return ArrayDataset(np.tile(values[:, None, None], (1, 4, 4)), np.arange(count) % 2)


@pytest.fixture
def make_task() -> Callable[..., Task]:
    """A task of 40 training, 8 validation and 12 test samples with values 0.., 100.. and 200.."""

    def make(name="ramp", **options):
        options = {"num_classes": 2, "splits": lambda: Splits(ramp(40), ramp(8, 100), ramp(12, 200))} | options
        return Task(name, **options)

    return make

"""Streams that earlier versions of the package have written, under ``fixtures``, go on."""

import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem import ContinualMergeCallback

FIXTURES = Path(__file__).parent / "fixtures"
TRAINER = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Model(L.LightningModule):
    """What the fixtures were made with."""

    task_specific = ("head",)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx=0):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


class Data(L.LightningDataModule):
    def __init__(self, number):
        super().__init__()
        self.task_name, self.task_weight = f"task_{number}", float(number)
        x = torch.randn(48, 4, generator=torch.Generator().manual_seed(number))
        self.data = TensorDataset(x, (x[:, number % 4] > 0).long() + (x[:, 0] > 1).long())

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=16)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=16)


@pytest.mark.parametrize("folder", sorted(path.name for path in FIXTURES.iterdir()))
def test_goes_on_with_a_stream_of_an_earlier_version(folder, small_stream):
    shutil.copytree(FIXTURES / folder, small_stream / "stream_dir")
    method = folder.rpartition("-")[0]
    merge = ContinualMergeCallback(method=method, calibration_size=16, dirpath="stream_dir")
    assert merge.report.tasks == ["task_1", "task_2"]
    accuracies = merge.report.accuracy[1]
    model = Model()
    merge.load_base(model)
    tasks = [Data(1), Data(2), Data(3)]

    fitted = []
    for task in merge.remaining(tasks):
        fitted.append(task.task_name)
        L.Trainer(max_epochs=2, callbacks=[merge], **TRAINER).fit(model, datamodule=task)

    assert fitted == ["task_3"]
    assert merge.report.merges[-1].t == 0.5  # 3 / (1 + 2 + 3)
    assert merge.report.accuracy[1] == accuracies
    assert len(merge.report.accuracy[2]) == 3
    again = ContinualMergeCallback(method=method, calibration_size=16, dirpath="stream_dir")
    assert again.report.tasks == ["task_1", "task_2", "task_3"]


@pytest.mark.parametrize("folder", sorted(path.name for path in FIXTURES.iterdir()))
def test_an_earlier_versions_merged_model_gives_the_accuracies_it_was_measured_with(folder, small_stream):
    shutil.copytree(FIXTURES / folder, small_stream / "stream_dir")
    merge = ContinualMergeCallback(method=folder.rpartition("-")[0], dirpath="stream_dir", calibration_size=16)
    model = Model().eval()

    for number in (1, 2):
        merge.load_task(model, f"task_{number}")
        x, y = Data(number).data.tensors
        with torch.no_grad():
            accuracy = (model(x).argmax(1) == y).double().mean().item()
        assert accuracy == pytest.approx(merge.report.accuracy[1][number - 1])

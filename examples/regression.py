"""Regression: the R2 score is the metric, and each task has a head of its own.

The tasks predict one column of scikit-learn's diabetes data each (the disease's progression, the body mass index and
the blood pressure) from the eight columns left. ``task_metric`` names the metric, and every table, figure and logger
follows. Each task keeps its own head (``exclude=["head"]``); what they share is merged. Scores are read once, after the
last task that ``remaining`` hands out (``evaluate="last"``).

Run it with ``python examples/regression.py``; it takes a few seconds and downloads nothing.
"""

import lightning as L
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.regression import R2Score

from lightning_odem import ContinualMergeCallback

BODY_MASS, PRESSURE, PROGRESSION = 2, 3, 10
TASKS = {"progression": PROGRESSION, "body mass": BODY_MASS, "pressure": PRESSURE}


class Column(L.LightningDataModule):
    """One standardised column as the target; the columns that are no task's target as inputs."""

    def __init__(self, name: str, column: int) -> None:
        super().__init__()
        self.task_name = name
        inputs, progression = load_diabetes(return_X_y=True)
        table = torch.tensor(inputs).float()
        table = torch.cat([table, torch.tensor(progression).float()[:, None]], dim=1)
        table = (table - table.mean(0)) / table.std(0)
        inputs = table[:, [number for number in range(11) if number not in TASKS.values()]]
        data = TensorDataset(inputs, table[:, column])
        self.train, self.val = random_split(data, [0.75, 0.25], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=128)


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.head = nn.Linear(32, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs)).squeeze(1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self(inputs), targets)

    def task_metric(self, task: str) -> R2Score:
        return R2Score()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def main() -> None:
    L.seed_everything(0)
    model = Regression()
    merge = ContinualMergeCallback(exclude=["head"], evaluate="last")
    for task in merge.remaining(Column(name, column) for name, column in TASKS.items()):
        trainer = L.Trainer(max_epochs=15, callbacks=[merge], logger=False, enable_checkpointing=False)
        trainer.fit(model, datamodule=task)
    print(merge.table())


if __name__ == "__main__":
    main()

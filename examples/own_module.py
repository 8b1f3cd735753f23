"""A LightningModule of one's own, without anything of this package but the callback.

The tasks are permuted pixels of scikit-learn's digits, the classic domain-incremental benchmark. The module has
``training_step`` and ``forward`` and knows nothing of merging. Run it with ``python examples/own_module.py``; it takes
a few seconds and downloads nothing.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem import ContinualMergeCallback


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, labels = batch
        loss = nn.functional.cross_entropy(self(pixels), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def loaders(task: int) -> tuple[DataLoader, DataLoader]:
    """Training and validation data of a task: its own order of the pixels, the first in their natural one."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(task)) if task else torch.arange(64)
    data = TensorDataset(pixels[:, order].float() / 16, labels)
    train, val = torch.utils.data.random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=256)


def main() -> None:
    L.seed_everything(0)
    model = Net()
    merge = ContinualMergeCallback(calibration_size=300)
    for task in range(3):
        train, val = loaders(task)
        trainer = L.Trainer(
            max_epochs=5, callbacks=[merge], logger=False, enable_checkpointing=False, enable_model_summary=False
        )
        trainer.fit(model, train, val)  # the validation data also measures what the merged model still knows
    print(merge.table())


if __name__ == "__main__":
    main()

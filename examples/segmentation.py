"""Segmentation: a network of torchvision, with the mean intersection over union as the metric.

The tasks are digits on a canvas, to be told from the background pixel by pixel. The base model has learned bright
digits on black; in the tasks they are on stripes, faint or noisy. ``prediction_step`` says what the metric compares,
here classes of pixels, since networks of torchvision give a dictionary; ``task_metric`` names the metric. The epoch
that is merged is each task's best one by its ``ModelCheckpoint`` (``merge_weights="best"``).

Run it with ``python examples/segmentation.py``; it takes half a minute and downloads nothing.
"""

from functools import partial

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.segmentation import MeanIoU
from torchvision.models import mobilenet_v3_small
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import LRASPP

from lightning_odem import ContinualMergeCallback

CLASSES, SIZE, SAMPLES = 2, 32, 320
Batch = tuple[Tensor, Tensor]


class Digits(L.LightningDataModule):
    """Images [3, 32, 32] of one digit of 16 pixels somewhere, and the classes of their pixels [32, 32]."""

    def __init__(self, look: str) -> None:
        super().__init__()
        self.task_name = look
        draw = torch.Generator().manual_seed(0)
        digits = torch.from_numpy(load_digits().images[:SAMPLES]).float() / 16
        digits = nn.functional.interpolate(digits[:, None], scale_factor=2)[:, 0]
        canvas = torch.zeros(SAMPLES, SIZE, SIZE)
        for number, (row, column) in enumerate(torch.randint(16, (SAMPLES, 2), generator=draw)):
            canvas[number, row : row + 16, column : column + 16] = digits[number]
        masks = canvas > 0.4
        stripes = 0.5 * (torch.arange(SIZE) // 2 % 2)
        noise = torch.randn(SAMPLES, SIZE, SIZE, generator=draw)
        looks = {"striped": 0.7 * canvas + stripes, "faint": 0.5 * canvas, "noisy": canvas + 0.2 * noise}
        images = looks.get(look, canvas) + 0.1 * noise
        self.samples = TensorDataset(images[:, None].expand(-1, 3, -1, -1), masks.long())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.utils.data.Subset(self.samples, range(SAMPLES - 64)), batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.utils.data.Subset(self.samples, range(SAMPLES - 64, SAMPLES)), batch_size=64)


class Segmentation(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, momentum=0.1)
        layers = mobilenet_v3_small(width_mult=0.5, norm_layer=norm).features[:4]
        backbone = IntermediateLayerGetter(layers, {"0": "low", "3": "high"})
        self.net = LRASPP(backbone, low_channels=8, high_channels=16, num_classes=CLASSES, inter_channels=32)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, masks = batch
        return nn.functional.cross_entropy(self.net(images)["out"], masks)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def prediction_step(self, batch: Batch, task: str) -> Batch:
        images, masks = batch
        return self.net(images)["out"].argmax(dim=1), masks

    def task_metric(self, task: str) -> MeanIoU:
        return MeanIoU(num_classes=CLASSES, input_format="index")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def main() -> None:
    L.seed_everything(0)
    model, quiet = Segmentation(), {"logger": False, "enable_model_summary": False}
    L.Trainer(max_epochs=20, enable_checkpointing=False, **quiet).fit(model, Digits("bright"))  # the base model
    merge = ContinualMergeCallback(calibration_size=96, merge_weights="best", finetune_from="merged")
    for look in ("striped", "faint", "noisy"):
        best = ModelCheckpoint("segmentation", monitor="val/loss")
        L.Trainer(max_epochs=6, callbacks=[merge, best], **quiet).fit(model, datamodule=Digits(look))
    print(merge.table())
    print("Merged are the epochs", [record.epoch for record in merge.report.merges])


if __name__ == "__main__":
    main()

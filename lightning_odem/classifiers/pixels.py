"""A small LightningModule whose tasks have the same classes and share one head."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchvision.ops import MLP

from lightning_odem.arguments import check_integer, check_range
from lightning_odem.classifiers.classification import ClassificationSteps


class PixelClassifier(ClassificationSteps):
    """A perceptron on the pixels of small images: one network with one head for all tasks.

    The tasks have the same classes (domain-incremental learning), so a model answers without being told the task.
    Images are [B, C, H, W], uint8 or floating in [0, 1]. A black pixel is 0 and does not change the weights that it
    meets. So tasks that lie in different places of the image hardly get in each other's way.

    Args:
        pixels: Number of values of one image, C times H times W.
        num_classes: Number of classes of every task.
        hidden: Widths of the hidden layers.
        lr: Largest learning rate of the one-cycle schedule.
        weight_decay: AdamW's weight decay.

    Raises:
        ValueError: For a number outside its range.

    Example:
        >>> model = PixelClassifier(pixels=64, num_classes=10)
        >>> model(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        pixels: int,
        num_classes: int,
        hidden: Sequence[int] = (512, 512),
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = [check_integer("hidden", width, 1) for width in hidden]
        self.network = MLP(
            check_integer("pixels", pixels, 1), [*widths, check_integer("num_classes", num_classes, 1)], inplace=None
        )
        self.lr = check_range("lr", lr, 0)
        self.weight_decay = check_range("weight_decay", weight_decay, 0)

    def forward(self, images: Tensor, task: str | None = None) -> Tensor:
        """Logits [B, classes]; the same for every task."""
        pixels = images.flatten(1)
        return self.network(pixels / 255 if images.dtype == torch.uint8 else pixels)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a one-cycle schedule over the steps of this run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

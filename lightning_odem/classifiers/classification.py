"""The steps of a module that classifies the images of several tasks."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_odem.calibration.prediction import labelled, split_targets


class ClassificationSteps(LightningModule, ABC):
    """Training, evaluation and calibration by cross-entropy; a subclass computes the logits."""

    @abstractmethod
    def forward(self, images: Tensor, task: str | None = None) -> Tensor:
        """Logits [B, classes] of a task; without a name, of the current one."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the current task, logged as ``train/loss``."""
        images, targets = batch
        loss = cross_entropy(self(images), targets)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy of the current task as ``val/acc``."""
        self._log_accuracy("val/acc", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy of the current task as ``test/acc``."""
        self._log_accuracy("test/acc", batch)

    def calibration_step(self, batch: Any, task: str) -> Tensor:
        """Mean cross-entropy of a task's calibration samples.

        Raises:
            ValueError: If the samples have no labels.
        """
        images, targets = labelled(batch, task)
        return cross_entropy(self(images, task), targets)

    def prediction_step(self, batch: Any, task: str) -> tuple[Tensor, Tensor | None]:
        """Logits [B, classes] and targets [B] of a task; None for the targets of images without labels."""
        images, targets = split_targets(batch)
        return self(images, task), targets

    def _log_accuracy(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        images, targets = batch
        accuracy = (self(images).argmax(dim=1) == targets).float().mean()
        self.log(name, accuracy, prog_bar=True, batch_size=len(targets), sync_dist=True)

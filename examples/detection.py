"""Detection: torchvision's Faster R-CNN, with the average precision that the module logs as the score.

Batches are lists of images and of dictionaries, as torchvision's detectors take them: nothing to do. The detectors give
losses in training mode only, so the calibration calls ``training_step`` in that mode, with norm layers and dropout in
eval mode. ``monitor="val/ap50"`` takes the score from the module's own validation: the average precision at an
intersection over union of a half, by torchmetrics and torchvision as they are installed. For many thresholds there is
``MeanAveragePrecision`` of torchmetrics, as ``task_metric``; it needs ``pip install 'torchmetrics[detection]'``.

Run it with ``python examples/detection.py``; it takes a minute and downloads nothing.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_average_precision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

from lightning_odem import ContinualMergeCallback

SIZE, SIDE = 48, 14
COLOURS = {"white": (1.0, 1.0, 1.0), "red": (1.0, 0.3, 0.3), "green": (0.3, 1.0, 0.3), "blue": (0.3, 0.3, 1.0)}
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class Squares(L.LightningDataModule):
    """Noisy pictures of several widths, with one or two squares in the colour of the task."""

    def __init__(self, colour: str) -> None:
        super().__init__()
        self.task_name, self.samples, draw = colour, [], torch.Generator().manual_seed(0)
        for number in range(160):
            image, boxes = 0.3 * torch.rand(3, SIZE, SIZE + number % 3, generator=draw), []
            for left in [4, 28] if number % 2 else [16]:
                top = int(torch.randint(SIZE - SIDE, (), generator=draw))
                image[:, top : top + SIDE, left : left + SIDE] += 0.7 * torch.tensor(COLOURS[colour]).view(3, 1, 1)
                boxes.append([left, top, left + SIDE, top + SIDE])
            target = {"boxes": torch.tensor(boxes).float(), "labels": torch.ones(len(boxes), dtype=torch.long)}
            self.samples.append((image, target))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples[32:], batch_size=8, shuffle=True, collate_fn=as_lists)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.samples[:32], batch_size=8, collate_fn=as_lists)


def as_lists(samples: list) -> Batch:
    return tuple(map(list, zip(*samples, strict=True)))


class Detector(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        first, second, third = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        backbone = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        backbone.out_channels = 16
        heads = {"box_head": TwoMLPHead(16 * 9, 32), "box_predictor": FastRCNNPredictor(32, num_classes=2)}
        places = {"rpn_anchor_generator": AnchorGenerator(((SIDE,),), ((1.0,),)), "min_size": SIZE, "max_size": 64}
        self.net = FasterRCNN(backbone, box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2), **heads, **places)
        self.found, self.boxes = [(0.0, False)], 0  # scores, and whether they are of a box; the number of boxes

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return sum(self.net(*batch).values())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for prediction, target in zip(self.net(batch[0]), batch[1], strict=True):
            self.boxes += len(target["boxes"])
            overlaps = box_iou(prediction["boxes"], target["boxes"])
            for score, overlap in zip(prediction["scores"], overlaps, strict=True):  # the surest prediction comes first
                self.found.append((float(score), bool(overlap.max() > 0.5)))
                overlaps[:, overlap > 0.5] = 0.0  # a box is found once

    def on_validation_epoch_end(self) -> None:
        scores, hits = torch.tensor(self.found).unbind(1)
        precision = binary_average_precision(scores, hits.long()).nan_to_num()  # of the boxes that were found
        self.log("val/ap50", precision * hits.sum() / self.boxes)
        self.found, self.boxes = [(0.0, False)], 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    L.seed_everything(0)
    model = Detector()
    L.Trainer(max_epochs=6, logger=False, enable_checkpointing=False).fit(model, Squares("white"))  # the base model
    merge = ContinualMergeCallback(calibration_size=96, monitor="val/ap50", finetune_from="merged")
    for colour in ("red", "green", "blue"):
        trainer = L.Trainer(max_epochs=3, callbacks=[merge], logger=False, enable_checkpointing=False)
        trainer.fit(model, datamodule=Squares(colour))
    print(merge.table())


if __name__ == "__main__":
    main()

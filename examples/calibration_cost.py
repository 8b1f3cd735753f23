"""Time of a calibration pass beside the module's own training steps, on the same batches.

A calibration pass is one evaluation of the calibration loss with its gradient on all samples, through the module's own
``training_step``. Both see the same samples in batches of one size, in turns, on one thread. Times are processor times
per sample, and the smallest of all turns counts, since other work on the machine only adds to them. The loss and
gradient of a training step without its optimizer, and a pass without gradient, are beside them.

Run it with ``python examples/calibration_cost.py``; it takes about a minute and downloads nothing.
"""

import time
from collections.abc import Callable

import lightning as L
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.calibration.loss import ModuleLoss
from lightning_odem.parameters.snapshot import undisturbed
from lightning_odem.parameters.vector import ParameterVector

SAMPLES, BATCH, TURNS = 128, 32, 7
SHAPE = {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 6}
Samples = dict[str, Tensor] | tuple[Tensor, Tensor]


class Classifier(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Samples, batch_idx: int = 0) -> Tensor:
        if isinstance(batch, dict):
            return self.model(**batch).loss
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.0)


class Timing(L.Callback):  # steps and passes belong to modules that a Trainer runs
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (buffer := CalibrationBuffer(SAMPLES)).add("task", self.samples)
        batches = [batch.samples for batch in buffer.micro_batches(BATCH)]

        def train(step: Callable[[], object] = lambda: None) -> None:
            for batch in batches:
                pl_module.zero_grad()
                pl_module.training_step(trainer.strategy.batch_to_device(batch)).backward()
                step()

        with undisturbed(pl_module):  # eval mode for both, so that dropout costs neither of them anything
            vector = ParameterVector(pl_module)
            theta = vector.read()
            objective = CalibrationObjective(vector, buffer, ModuleLoss(pl_module), batch_size=BATCH)
            step = pl_module.configure_optimizers().step
            works = [lambda: train(step), train, lambda: objective.loss_and_grad(theta), lambda: objective.loss(theta)]
            times = [[cpu_seconds(work) for work in works] for _ in range(TURNS)]
        self.ms = [1000 * min(column) / SAMPLES for column in zip(*times, strict=True)]


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    images, labels = torch.randn(SAMPLES, 3, 32, 32), torch.arange(SAMPLES) % 10
    ids = torch.randint(1, 1000, (SAMPLES, 32))
    bert = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=10))
    cases = {
        "ViT": (timm.create_model("test_vit", img_size=32, num_classes=10), (images, labels)),
        "ResNet": (timm.create_model("test_resnet", num_classes=10), (images, labels)),
        "BERT": (bert, {"input_ids": ids, "labels": labels}),
        "GPT-2": (GPT2LMHeadModel(GPT2Config(**SHAPE)), {"input_ids": ids, "labels": ids}),
    }
    table = Table("ms", "training step", "without optimizer", "calibration pass", "without gradient", "pass / step")
    for name, (model, samples) in cases.items():
        timing = Timing(samples)
        trainer = L.Trainer(max_steps=0, accelerator="cpu", callbacks=[timing], logger=False)
        trainer.fit(Classifier(model), DataLoader(TensorDataset(images, labels)))
        table.add_row(name, *(f"{value:.3f}" for value in timing.ms), f"{timing.ms[2] / timing.ms[0]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""Adapters of a causal language model, one task after the other, with perplexity as the metric.

The base model is any folder of a causal language model with byte-sized tokens; without one, a tiny GPT-2 is trained on
Python's documentation first. The tasks are three kinds of text that come with Python. Each is learned by LoRA adapters
of peft on the frozen model; the callback finds them and merges what they compute. Run it with

    pip install peft transformers
    python examples/lora.py

It takes less than a minute and downloads nothing.
"""

import inspect
import this
from argparse import ArgumentParser
from html import entities
from pydoc_data.topics import topics

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.text import Perplexity
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_odem import ContinualMergeCallback

LENGTH = 64
DOCUMENTATION = "\n".join(topics.values())
TASKS = {
    "code": inspect.getsource(inspect),
    "entities": inspect.getsource(entities),
    "rot13": "".join(this.d.get(letter, letter) for letter in DOCUMENTATION),
}


class LanguageModel(L.LightningModule):
    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        ids, following = batch
        return nn.functional.cross_entropy(self(ids).flatten(0, 1), following.flatten())

    def task_metric(self, task: str) -> Perplexity:
        return Perplexity()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], self.lr)


class Text(L.LightningDataModule):
    """Pieces of a text as bytes, and for each byte the one that follows."""

    def __init__(self, name: str, text: str, pieces: int) -> None:
        super().__init__()
        self.task_name = name
        data = torch.tensor(list(text.encode()[: pieces * (LENGTH + 1)]))
        rows = data[: len(data) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        self.train, self.val = (TensorDataset(part[:, :-1], part[:, 1:]) for part in (rows[64:], rows[:64]))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=32)


def pretrained(epochs: int) -> nn.Module:
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    model = LanguageModel(GPT2LMHeadModel(config), lr=2e-3)
    L.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False).fit(model, Text("", DOCUMENTATION, 1500))
    return model.model


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    L.seed_everything(0)
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = LanguageModel(get_peft_model(pretrained(given.epochs), adapters), lr=5e-3)
    merge = ContinualMergeCallback(calibration_size=48)
    for name, text in TASKS.items():
        trainer = L.Trainer(max_epochs=given.epochs, callbacks=[merge], logger=False, enable_checkpointing=False)
        trainer.fit(model, datamodule=Text(name, text, 600))
    print(merge.table())
    model.model.save_pretrained("merged-adapter")  # the merged adapter, as peft loads it


if __name__ == "__main__":
    main()

"""Small modules with adapters of peft, and tasks for them."""

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Body(nn.Module):
    """Embedding, convolution, two linear layers and a head."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.query = nn.Linear(width, 2 * width)
        self.value = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 2)

    def forward(self, ids):
        hidden = self.embedding(ids)
        hidden = hidden + self.conv(hidden.transpose(1, 2)).transpose(1, 2).tanh()
        hidden = hidden + self.value(self.query(hidden).tanh())
        return self.classifier(self.norm(hidden).mean(1))


class Adapted(L.LightningModule):
    """A classifier of sequences of ids with adapters."""

    def __init__(self, width=16, lr=0.02, seed=0, **config):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"], **config}
            self.model = get_peft_model(Body(width), LoraConfig(**config))
        self.lr = lr

    def forward(self, ids):
        return self.model(ids)

    def training_step(self, batch, batch_idx=0):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.Adam([each for each in self.parameters() if each.requires_grad], self.lr)


class Sequences(L.LightningDataModule):
    """Sequences of ids whose class depends on one of them."""

    def __init__(self, number, size=64):
        super().__init__()
        self.task_name = f"task_{number}"
        ids = torch.randint(20, (size, 6), generator=torch.Generator().manual_seed(number))
        self.data = TensorDataset(ids, (ids[:, number % 6] > 9).long())

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=16)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=32)


def updates(module):
    """What peft says that each adapted layer adds to its weight, by name of the layer, in fp64."""
    return {
        name: layer.get_delta_weight("default").detach().double().clone()
        for name, layer in module.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def best_approximation(update, rank):
    """The best approximation of an update by a rank."""
    u, s, vh = torch.linalg.svd(update.flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).view(update.shape)


class Record(L.Callback):
    """Keeps the updates at the end of each training, before a merge behind it."""

    def __init__(self):
        self.updates = []

    def on_train_end(self, trainer, pl_module):
        self.updates.append(updates(pl_module))

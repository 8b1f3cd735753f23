"""Small modules, tasks and Trainers for the tests of the callback."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_odem import MergeMethod, MergeResult

FEATURES, CLASSES = 4, 3


class Classifier(L.LightningModule):
    """An ordinary module of a user: forward gives class scores, training_step the loss."""

    def __init__(self, dropout=0.0, batch_norm=False, classes=CLASSES, lr=0.1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            norm = [nn.BatchNorm1d(8)] if batch_norm else []
            self.body = nn.Sequential(nn.Linear(FEATURES, 8), *norm, nn.ReLU(), nn.Dropout(dropout))
            self.head = nn.Linear(8, classes)
        self.lr = lr

    def forward(self, inputs):
        return self.head(self.body(inputs))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = F.cross_entropy(self(inputs), targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Task(L.LightningDataModule):
    """24 training and 12 test samples around class centres of the task's own."""

    def __init__(self, number, name=None, weight=None, shuffle=False, batch_size=8, size=24):
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        centres = 2 * torch.randn(CLASSES, FEATURES, generator=generator)
        self.train_set, self.test_set = (_samples(centres, count, generator) for count in (size, 12))
        self.shuffle, self.batch_size = shuffle, batch_size
        if name is not None:
            self.task_name = name
        if weight is not None:
            self.task_weight = weight

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=self.shuffle)

    def val_dataloader(self):
        return DataLoader(self.test_set, batch_size=12)

    def test_dataloader(self):
        return DataLoader(self.test_set, batch_size=5)


def _samples(centres, count, generator):
    targets = torch.arange(count) % CLASSES
    return TensorDataset(centres[targets] + torch.randn(count, FEATURES, generator=generator), targets)


class Streamed(Task):
    """The same task as a stream of samples without a length."""

    def train_dataloader(self):
        return DataLoader(_Iterable(self.train_set), batch_size=self.batch_size)


class _Iterable(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[index] for index in range(len(self.dataset)))


def make_trainer(*callbacks, **options):
    """A quiet Trainer on the CPU; two epochs of three steps unless told otherwise."""
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    limits = {} if {"max_epochs", "max_steps", "fast_dev_run"} & options.keys() else {"max_epochs": 2}
    return L.Trainer(callbacks=list(callbacks), **quiet | limits | options)


def fit(module, task, *callbacks, ckpt_path=None, **options):
    """Fit one task with a Trainer of its own, which is returned."""
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, datamodule=task, ckpt_path=ckpt_path)
    return trainer


def weights(module):
    """A copy of the parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def everything(module):
    """A copy of parameters and buffers by name."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    """Whether two dictionaries of tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close(first, second, **tolerance):
    """Whether two dictionaries of tensors are equal up to rounding."""
    return first.keys() == second.keys() and all(torch.allclose(first[k], second[k], **tolerance) for k in first)


def accuracy(module, dataset):
    """Accuracy of a module in eval mode, by hand."""
    training = module.training
    module.eval()
    with torch.no_grad():
        inputs, targets = dataset.tensors
        result = (module(inputs).argmax(1) == targets).double().mean().item()
    module.train(training)
    return result


class Incoming(L.Callback):
    """Stands before the merge callback and keeps every model it is going to merge."""

    def __init__(self):
        self.models, self.starts, self.epochs, self.steps = [], [], [], []
        self.batches = 0

    def on_train_start(self, trainer, pl_module):
        self.batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.batches == 0:
            self.starts.append(everything(pl_module))
        self.batches += 1

    def on_train_end(self, trainer, pl_module):
        self.models.append(everything(pl_module))
        self.epochs.append(trainer.current_epoch)
        self.steps.append(self.batches)


class Failing(L.Callback):
    """Raises an exception in a hook."""

    def __init__(self, hook, error):
        setattr(self, hook, self._fail)
        self._error = error

    def _fail(self, *arguments):
        raise self._error


class Watching(MergeMethod):
    """Keeps what it is given and averages."""

    def __init__(self, *needs):
        self.needs, self.contexts = needs, []

    def start(self, incoming, context):
        self.contexts.append(context)
        return MergeResult(incoming)

    def merge(self, merged, incoming, t, context):
        self.contexts.append(context)
        return MergeResult(merged.lerp_(incoming, t))

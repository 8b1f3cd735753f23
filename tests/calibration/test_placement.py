import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem.calibration import CalibrationBuffer, CalibrationOptions
from lightning_odem.calibration.items import Items
from lightning_odem.calibration.placement import may_move, on_device
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.stream import Stream

META = torch.device("meta")  # a device that is not the CPU on any machine


def filled(images, **options):
    buffer = CalibrationBuffer(8)
    for task in "ab":
        buffer.add(task, {"image": images, "label": torch.arange(len(images)) % 2}, **options)
    return buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_images_are_on_the_device_and_labels_on_the_cpu(dtype):
    buffer = filled(torch.zeros(6, 3, 4, 4, dtype=dtype))
    moved = on_device(buffer, META)
    batches = [*moved.micro_batches(3), *next(moved.minibatches(5, torch.Generator()))]
    assert {batch.samples["image"].device for batch in batches} == {META}
    assert {batch.samples["label"].device.type for batch in batches} == {"cpu"}
    assert {batch.samples["image"].device.type for batch in buffer.micro_batches(3)} == {"cpu"}
    assert [batch.share for batch in moved.micro_batches(3)] == [batch.share for batch in buffer.micro_batches(3)]


def test_token_ids_stay_on_the_cpu():
    moved = on_device(filled(torch.zeros(6, 128, dtype=torch.int64)), META)
    assert {batch.samples["image"].device.type for batch in moved.micro_batches(3)} == {"cpu"}


def test_samples_that_are_collated_in_each_pass_stay_where_they_are():
    buffer = CalibrationBuffer(4)
    buffer.add("a", Items([torch.zeros(2), torch.zeros(3)], list))
    (batch,) = on_device(buffer, META).micro_batches(4)
    assert isinstance(batch.samples, Items)


def test_on_a_cpu_nothing_is_done():
    buffer = filled(torch.zeros(6, 2))
    assert on_device(buffer, torch.device("cpu")) is buffer


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx=0):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Before(Classifier):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch


class Transfer(Classifier):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class After(Classifier):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 2))


class BeforeInData(Data):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch


class Asks(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.answer = may_move(pl_module)


@pytest.mark.parametrize(
    ("module", "data", "expected"),
    [
        (Classifier, Data, True),
        (After, Data, True),
        (Before, Data, False),
        (Transfer, Data, False),
        (Classifier, BeforeInData, False),
    ],
)
def test_hooks_that_may_expect_samples_on_the_cpu_get_them_there(module, data, expected):
    asks = Asks()
    trainer = L.Trainer(max_steps=0, callbacks=[asks], logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(module(), data())
    assert asks.answer is expected


class Merges(L.Callback):
    def __init__(self, keep_on_device):
        self.options = CalibrationOptions(batch_size=3, keep_on_device=keep_on_device)

    def on_fit_start(self, trainer, pl_module):
        base = take_snapshot(pl_module)
        generator = torch.Generator().manual_seed(0)
        stream = Stream("ode", base=base, calibration_size=16, calibration=self.options)
        for task in "abc":
            incoming = {name: value + torch.randn(value.shape, generator=generator) for name, value in base.items()}
            samples = torch.randn(9, 4, generator=generator), torch.arange(9) % 2
            stream.merge(pl_module, incoming, task, samples=samples)
        self.merged = stream.state.merged


@pytest.mark.parametrize(
    "accelerator",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_merges_have_the_same_bits_with_samples_on_the_device(accelerator):
    found = []
    for keep_on_device in (False, True):
        merges = Merges(keep_on_device)
        trainer = L.Trainer(max_steps=0, callbacks=[merges], logger=False, accelerator=accelerator, devices=1)
        trainer.fit(Classifier(), Data())
        found.append(merges.merged)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

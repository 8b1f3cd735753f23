import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem.classifiers import PixelClassifier
from lightning_odem.classifiers.pretraining import pretrain


class Corners(L.LightningDataModule):
    """The class is the row that is bright, in the left column of the image."""

    task_name, num_classes = "corners", 4

    def train_dataloader(self):
        labels = torch.arange(64) % 4
        images = torch.zeros(64, 1, 4, 4, dtype=torch.uint8)
        images[torch.arange(64), 0, labels, 0] = 255
        return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PixelClassifier(pixels=16, num_classes=4, hidden=[32], lr=1e-4)


def test_logits_do_not_depend_on_the_task(model):
    images = torch.rand(3, 1, 4, 4)
    torch.testing.assert_close(model(images, "one"), model(images, "other"), rtol=0, atol=0)


def test_bytes_and_fractions_are_the_same_image(model):
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(images / 255))


def test_pretraining_learns_at_its_own_rate_and_leaves_that_of_fine_tuning(model):
    pretrain(model, Corners(), max_epochs=20, lr=0.01, accelerator="cpu", enable_progress_bar=False)
    batch, labels = next(iter(Corners().train_dataloader()))
    assert (model(batch).argmax(1) == labels).all()
    assert model.lr == 1e-4


def test_weights_of_pixels_that_are_black_stay(model):
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
    model.weight_decay, before = 0.0, first.weight.detach().clone()
    pretrain(model, Corners(), max_epochs=2, lr=0.01, accelerator="cpu", enable_progress_bar=False)
    changed = (first.weight != before).any(0).view(4, 4)
    assert changed[:, 0].all()
    assert not changed[:, 1:].any()


@pytest.mark.parametrize("argument", [{"pixels": 0}, {"hidden": [0]}, {"num_classes": 0}, {"lr": -1.0}])
def test_numbers_out_of_range_are_refused_by_name(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        PixelClassifier(**{"pixels": 4, "num_classes": 2, **argument})

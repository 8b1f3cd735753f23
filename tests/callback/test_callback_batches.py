"""Real dataloaders whose batches are no tensors of one shape in plain containers: user code gets them as they are."""

import lightning as L
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset
from toy import make_trainer
from transformers import BatchEncoding

from lightning_odem import CalibrationOptions, ContinualMergeCallback
from lightning_odem.calibration.containers import CannotBeKeptError

pytestmark = pytest.mark.usefixtures("small_stream")


def texts(task):
    generator = torch.Generator().manual_seed(task)
    for _ in range(48):
        ids = torch.randint(1, 30, (int(torch.randint(2, 12, (), generator=generator)),), generator=generator)
        yield ids, int(ids[0] > 15) ^ task


class Stream(IterableDataset):
    def __init__(self, task):
        self.task = task

    def __iter__(self):
        return texts(self.task)


def pad(samples):
    ids = pad_sequence([ids for ids, _ in samples], batch_first=True)
    return BatchEncoding(
        {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([y for _, y in samples])}
    )


class Texts(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.out = nn.Embedding(30, 8, padding_idx=0), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        assert type(batch) is BatchEncoding
        return cross_entropy(self.prediction_step(batch, "")[0], batch["labels"])

    def prediction_step(self, batch, task):
        return self.out(self.emb(batch["input_ids"]).sum(1)), batch["labels"]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def loader(data):
    return DataLoader(data, 4, collate_fn=pad)


def given(merge, task):
    merge.calibration_data[f"task_{task + 1}"] = loader(list(texts(task)))


SOURCES = {
    "dataset": (lambda task: list(texts(task)), lambda merge, task: None),
    "stream": (Stream, lambda merge, task: None),
    "loader": (Stream, given),
}


@pytest.mark.parametrize("method", ["ode", "ode_paper", "ode_released", "average_replay"])
@pytest.mark.parametrize("source", SOURCES)
def test_texts_of_any_length_are_merged_in_batches_padded_to_the_longest(source, method):
    make, give = SOURCES[source]
    notes = []

    class Noting(Texts):
        def training_step(self, batch, batch_idx):
            if not self.training:
                notes.append({key: value.clone() for key, value in batch.items()})
            return super().training_step(batch, batch_idx)

    module, merge = Noting(), ContinualMergeCallback(method, calibration_size=32)
    for task in range(2):
        give(merge, task)
        make_trainer(merge).fit(module, loader(make(task)), loader(list(texts(task))))
    known = {tuple(ids.tolist()) for task in range(2) for ids, _ in texts(task)}
    assert notes
    for batch in notes:
        lengths = batch["attention_mask"].sum(1)
        assert int(lengths.max()) == batch["input_ids"].shape[1]
        for ids, length in zip(batch["input_ids"], lengths, strict=True):
            assert tuple(ids[:length].tolist()) in known
            assert not ids[length:].any()


@pytest.mark.parametrize("source", SOURCES)
def test_a_stream_of_texts_goes_on_in_another_process(source):
    make, give = SOURCES[source]
    results = []
    for split in (False, True):
        L.seed_everything(0, verbose=False)
        module, merge = Texts(), ContinualMergeCallback("ode", calibration_size=32, dirpath=f"texts{split}")
        for task in range(2):
            if split and task:
                L.seed_everything(0, verbose=False)
                module, merge = Texts(), ContinualMergeCallback("ode", calibration_size=32, dirpath="textsTrue")
            give(merge, task)
            make_trainer(merge).fit(module, loader(make(task)), loader(list(texts(task))))
        results.append(nn.utils.parameters_to_vector(module.parameters()).detach())
    assert torch.equal(*results)


class Images(Dataset):
    """Images of different sizes, with boxes where asked for."""

    def __init__(self, channels=1, boxes=False):
        self.channels, self.boxes = channels, boxes

    def __len__(self):
        return 24

    def __getitem__(self, index):
        image = torch.full((self.channels, 8 + 4 * (index % 3), 8), index / 24)
        if not self.boxes:
            return image, index % 3
        count = 1 if self.channels == 1 else 1 + index % 3
        return image, {"boxes": torch.full((count, 4), index / 24), "labels": torch.ones(count).long()}


class ImageStream(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return (self.images[index] for index in range(len(self.images)))


class Convolution(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("loss", ["labels", "logits"])
@pytest.mark.parametrize("wrap", [lambda images: images, ImageStream])
def test_images_that_cannot_be_stacked_are_merged(wrap, loss):
    module = Convolution()
    merge = ContinualMergeCallback(calibration_size=16, calibration=CalibrationOptions(loss=loss))
    for _ in range(2):
        make_trainer(merge).fit(module, DataLoader(wrap(Images()), 1))
    assert merge.report.merges[-1].calibration == {"task_1": 8, "task_2": 8}


class Boxes(L.LightningModule):
    def __init__(self, channels):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(channels, 4)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        assert type(images) is type(targets) is list
        assert len(images) == len(targets)
        out = torch.stack([self.net(image.flatten(1).mean(1)) for image in images])
        for image, target in zip(images, targets, strict=True):
            assert torch.equal(image[0, 0, :4], target["boxes"][0])  # they belong together
        return sum((one - target["boxes"]).abs().mean() for one, target in zip(out, targets, strict=True)) / len(out)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def lists(samples):
    return tuple(map(list, zip(*samples, strict=True)))


@pytest.mark.parametrize("wrap", [lambda images: images, ImageStream])
@pytest.mark.parametrize("channels", [1, 3])
def test_lists_of_images_and_their_boxes_are_samples_one_by_one(channels, wrap):
    module, merge = Boxes(channels), ContinualMergeCallback(calibration_size=15)
    for _ in range(2):
        make_trainer(merge).fit(module, DataLoader(wrap(Images(channels, boxes=True)), 5, collate_fn=lists))
    assert merge.report.merges[-1].calibration == {"task_1": 8, "task_2": 7}


def test_a_detector_of_torchvision_is_merged():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    class Detection(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            boxes = torch.tensor([[2.0, 2.0, 20.0, 20.0 + index]] * (index % 2 + 1))
            return torch.rand(3, 32, 32 + index), {"boxes": boxes, "labels": torch.ones(len(boxes)).long()}

    class Detector(L.LightningModule):
        def __init__(self):
            super().__init__()
            body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU())
            body.out_channels = 8
            anchors = AnchorGenerator(((16,),), ((1.0,),))
            sizes = {"min_size": 32, "max_size": 40, "box_detections_per_img": 4, "rpn_post_nms_top_n_train": 8}
            pool = MultiScaleRoIAlign(["0"], 3, 1)
            self.net = FasterRCNN(body, 2, rpn_anchor_generator=anchors, box_roi_pool=pool, **sizes)

        def training_step(self, batch, batch_idx):
            return sum(self.net(*batch).values())

        def calibration_step(self, batch, task):
            images, targets = batch
            self.net.train()  # only then it gives losses
            return sum(self.net(images, targets).values())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    module, merge = Detector(), ContinualMergeCallback(calibration_size=4)
    for _ in range(2):
        make_trainer(merge).fit(module, DataLoader(Detection(), 2, collate_fn=lists))
    assert merge.report.merges[-1].calibration == {"task_1": 2, "task_2": 2}


class Pictures(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return Image.new("L", (8, 8), index), index % 3


def test_pictures_that_nobody_collates_are_refused_before_training_with_the_way_out():
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Images(), 1)

        def calibration_dataset(self):
            return Pictures()

    trainer = make_trainer(ContinualMergeCallback())
    with pytest.raises(CannotBeKeptError, match=r"of task 'task_1', from calibration_dataset\(\), .*collate_fn"):
        trainer.fit(Convolution(), datamodule=Data())
    assert trainer.global_step == 0


def test_a_batch_of_no_known_kind_is_refused_at_the_first_step_with_the_way_out():
    class Opaque(Texts):
        def training_step(self, batch, batch_idx):
            return self.out.weight.sum()

    trainer = make_trainer(ContinualMergeCallback())
    stream = DataLoader(Stream(0), 4, collate_fn=lambda samples: {"x": torch.zeros(4), "f": object()})
    with pytest.raises(
        CannotBeKeptError, match=r"of task 'task_1', from the training batches, .*calibration_dataset\(\)"
    ):
        trainer.fit(Opaque(), stream)


class TokenMean(L.LightningModule):
    """Its loss is a mean over those tokens that have a label; of a batch without any it is NaN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.out = nn.Embedding(30, 8), nn.Linear(8, 30)

    def training_step(self, batch, batch_idx):
        scores = self.out(self.emb(batch["input_ids"]))
        return cross_entropy(scores.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class CountedTokenMean(TokenMean):
    def calibration_step(self, batch, task):
        return self.training_step(batch, 0), (batch["labels"] >= 0).sum()


def mask(samples):
    """Hides a seventh of the tokens, so none of most samples."""
    ids = pad_sequence([ids[:3] for ids, _ in samples], batch_first=True)
    hidden = (torch.rand(ids.shape) < 1 / 7) & (ids > 0)
    return BatchEncoding({"input_ids": ids.masked_fill(hidden, 29), "labels": ids.masked_fill(~hidden, -100)})


@pytest.mark.parametrize("kind", [TokenMean, CountedTokenMean])
@pytest.mark.parametrize("method", ["ode", "ode_paper", "ode_released", "average_replay"])
def test_a_masked_language_model_is_merged_though_most_samples_have_no_target(method, kind):
    L.seed_everything(0, verbose=False)
    merge = ContinualMergeCallback(method, calibration_size=30, calibration=CalibrationOptions(batch_size=1))
    module = kind()
    for task in range(2):
        make_trainer(merge).fit(module, DataLoader(list(texts(task)), 48, collate_fn=mask))
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert method == "average_replay" or 0 < merge.report.merges[-1].loss_after < 10


def test_the_size_of_micro_batches_changes_counted_losses_by_rounding_only():
    found = []
    for size in (1, 4, 100):
        L.seed_everything(0, verbose=False)
        options = CalibrationOptions(batch_size=size)
        module, merge = CountedTokenMean(), ContinualMergeCallback("ode", calibration_size=30, calibration=options)
        for task in range(2):
            make_trainer(merge).fit(module, DataLoader(list(texts(task)), 12, collate_fn=mask))
        record = merge.report.merges[-1]
        found.append((record.loss_before, record.loss_after))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_losses_that_compare_samples_get_batches_as_trained():
    sizes = []

    class Contrastive(Texts):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch["labels"])) if not self.training else None
            return super().training_step(batch, batch_idx)

    options = CalibrationOptions(batch_size="as trained")
    merge = ContinualMergeCallback("ode_paper", calibration_size=32, calibration=options)
    module = Contrastive()
    for task in range(2):
        make_trainer(merge).fit(module, loader(list(texts(task))))
    assert set(sizes) - {2} == {4}  # two try the loss before training

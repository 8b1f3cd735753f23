"""Three tasks of the models that people have, as they have them, with the one line that they add."""

import math

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.demos import LightningTransformer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v3_small
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.segmentation import FCN, LRASPP
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import MultiScaleRoIAlign
from toy import Incoming, make_trainer, weights

from lightning_odem import ContinualMergeCallback

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("small_stream")

CLASSES, WORDS, LENGTH, SAMPLES = 5, 20, 6, 16
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Module(L.LightningModule):
    """A model that learns by ``loss(batch)`` and logs the loss of its validation data."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


class WithKeywords(Module):
    """A model of transformers, whose batches are its keyword arguments."""

    def loss(self, batch):
        return self(**batch).loss


class Classifier(Module):
    """A model that gives class scores, of images or of pixels."""

    def loss(self, batch):
        inputs, targets = batch
        scores = self(inputs)
        return cross_entropy(scores["out"] if isinstance(scores, dict) else scores, targets)


class Detector(Module):
    """A detector of torchvision, which gives losses in training mode and boxes in eval mode."""

    def loss(self, batch):
        return sum(self(*batch).values())

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        found = self(images)
        self.log("val_boxes", float(sum(len(one["boxes"]) for one in found)), batch_size=len(images))


class Language(LightningTransformer):
    """Lightning's language model without its download."""

    def __init__(self):
        super().__init__(vocab_size=WORDS)

    def prepare_data(self):
        pass


def random(number):
    return torch.Generator().manual_seed(number)


def words(number):
    return torch.randint(1, WORDS, (SAMPLES, LENGTH), generator=random(number))


def loader(samples, **options):
    return DataLoader(samples, 8, **options)


def pairs(number):
    ids = words(number)
    return loader(TensorDataset(ids, ids.roll(-number - 1, 1)))


def dictionaries(number, labels):
    ids = words(number)
    return loader([{"input_ids": one, "labels": label} for one, label in zip(ids, labels(ids), strict=True)])


def tokens(number):
    return dictionaries(number, lambda ids: (ids + number) % CLASSES)


def sentences(number):
    return dictionaries(number, lambda ids: (ids[:, 0] + number) % CLASSES)


def texts(number):
    return dictionaries(number, lambda ids: ids)


def images(number, size=32, masks=False):
    targets = torch.arange(SAMPLES) % CLASSES
    levels = torch.roll(torch.arange(CLASSES), number)[targets].view(-1, 1, 1, 1)
    noise = torch.randn(SAMPLES, 3, size, size, generator=random(number))
    if masks:
        targets = targets.view(-1, 1, 1).expand(-1, size, size).contiguous()
    return loader(TensorDataset(levels + noise, targets))


def masks(number):
    return images(number, masks=True)


def boxes(number):
    samples = []
    for index in range(4):
        image = torch.rand(3, 32, 32 + index, generator=random(index))
        places = torch.tensor([[2.0, 2.0, 20.0, 20.0 + number]] * (index % 2 + 1))
        samples.append((image, {"boxes": places, "labels": torch.full((len(places),), 1 + number % 2)}))
    return DataLoader(samples, 2, collate_fn=lambda batch: tuple(map(list, zip(*batch, strict=True))))


def bert(kind, **sizes):
    config = transformers.BertConfig(vocab_size=WORDS, num_labels=CLASSES, **{**SIZES, **sizes})
    return WithKeywords(getattr(transformers, f"BertFor{kind}Classification")(config))


def minilm():
    """The shape of all-MiniLM-L6: six layers, 12 heads."""
    return bert("Sequence", hidden_size=48, num_hidden_layers=6, num_attention_heads=12, intermediate_size=192)


def t5():
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return WithKeywords(transformers.T5ForConditionalGeneration(config))


def gpt2():
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2)
    return WithKeywords(transformers.GPT2LMHeadModel(config))


def narrow():
    """The first layers of a narrow MobileNet, with 8 channels."""
    return mobilenet_v3_small(width_mult=0.25).features[:4]


def fcn():
    return Classifier(FCN(IntermediateLayerGetter(narrow(), {"3": "out"}), FCNHead(8, CLASSES)))


def lraspp():
    return Classifier(LRASPP(IntermediateLayerGetter(narrow(), {"0": "low", "3": "high"}), 8, 8, CLASSES, 16))


def vit():
    return Classifier(timm.create_model("test_vit", img_size=32, num_classes=CLASSES))


def faster_rcnn():
    body = narrow()
    body.out_channels = 8
    parts = {
        "rpn_anchor_generator": AnchorGenerator(((16,),), ((1.0,),)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 3, 1),
        "box_head": TwoMLPHead(72, 16),
        "box_predictor": FastRCNNPredictor(16, 3),
    }
    return Detector(FasterRCNN(body, min_size=32, max_size=40, **parts))


def ssdlite():
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, width_mult=0.25)
    model.transform.fixed_size = (96, 96)  # for 320, of which the model itself knows nothing
    return Detector(model)


MODELS = {
    "lightning_transformer": (Language, pairs),
    "bert_tokens": (lambda: bert("Token"), tokens),
    "minilm_sentences": (minilm, sentences),
    "t5": (t5, texts),
    "gpt2": (gpt2, texts),
    "fcn": (fcn, masks),
    "lraspp": (lraspp, masks),
    "timm_vit": (vit, images),
    "faster_rcnn": (faster_rcnn, boxes),
    "ssdlite": (ssdlite, boxes),
}
WITHOUT_PREDICTIONS = {
    "lightning_transformer": "for the inputs of task 'task_1' alone: .* missing 1 required",
    "bert_tokens": r"needs batches \(inputs, targets\), got dict",
    "t5": r"needs batches \(inputs, targets\), got dict",
    "fcn": "must be scores .* got OrderedDict",
    "faster_rcnn": "must be scores .* got list and targets list",
}


def stream(name, merge=None, validate=False):
    """Merge three tasks; what is merged is finite and differs from the base and from the last model."""
    torch.manual_seed(0)
    make, data = MODELS[name]
    module, merge, incoming = make(), merge or ContinualMergeCallback(), Incoming()
    for number in range(3):
        loaders = [data(number)] * (2 if validate else 1)
        make_trainer(incoming, merge, max_epochs=1).fit(module, *loaders)
    merged, report = weights(module), merge.report
    assert report.tasks == ["task_1", "task_2", "task_3"]
    assert all(value.isfinite().all() for value in merged.values())
    assert all(math.isfinite(loss) for record in report.merges[1:] for loss in record.path["loss"])
    for model in (incoming.starts[0], incoming.models[-1]):
        assert not all(torch.equal(merged[key], model[key]) for key in merged)
    return merge


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_one_line_merges_three_tasks(name):
    merge = stream(name)
    assert all(math.isnan(score) for row in merge.report.accuracy for score in row)  # no data to measure them on


@pytest.mark.parametrize("name", WITHOUT_PREDICTIONS)
def test_scores_that_nothing_defines_are_refused_before_training_with_the_remedies(name):
    make, data = MODELS[name]
    trainer = make_trainer(ContinualMergeCallback())
    with pytest.raises(ValueError, match=WITHOUT_PREDICTIONS[name]) as refusal:
        trainer.fit(make(), data(0), data(0))
    assert trainer.global_step == 0
    assert all(way in str(refusal.value) for way in ("prediction_step(batch, task)", "monitor=", "evaluate=False"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "lraspp", "faster_rcnn"])
def test_what_the_module_logs_is_the_score(name):
    logged = "val_boxes" if name == "faster_rcnn" else "val_loss"
    merge = stream(name, ContinualMergeCallback(monitor=logged, mode="min"), validate=True)
    assert all(math.isfinite(score) for row in merge.report.accuracy for score in row)


@pytest.mark.slow
def test_accuracies_of_an_image_classifier_need_nothing():
    merge = stream("timm_vit", validate=True)
    assert all(0.0 <= score <= 1.0 for row in merge.report.accuracy for score in row)


class Accurate(WithKeywords):
    """With what says which of its outputs are class scores."""

    def prediction_step(self, batch, task):
        scores = self(**batch).logits
        return scores.reshape(-1, scores.shape[-1]), batch["labels"].flatten()


@pytest.mark.slow
def test_accuracies_of_a_sentence_classifier_need_a_prediction_step(monkeypatch):
    monkeypatch.setitem(MODELS, "minilm_sentences", (lambda: Accurate(minilm().model), sentences))
    merge = stream("minilm_sentences", validate=True)
    assert all(0.0 <= score <= 1.0 for row in merge.report.accuracy for score in row)


class Precise(Detector):
    """With torchmetrics' mean average precision, which needs pycocotools."""

    def prediction_step(self, batch, task):
        return self(batch[0]), batch[1]

    def task_metric(self, task):
        from torchmetrics.detection import MeanAveragePrecision

        return MeanAveragePrecision()


@pytest.mark.slow
def test_mean_average_precision_is_the_score_of_a_detector(monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.setitem(MODELS, "faster_rcnn", (lambda: Precise(faster_rcnn().model), boxes))
    merge = stream("faster_rcnn", validate=True)
    assert merge.report.metrics["task_1"].label == "MeanAveragePrecision (%)"
    assert all(0.0 <= score <= 1.0 for row in merge.report.accuracy for score in row)

"""Whole streams of modules from other libraries, with the one line that a user adds."""

import lightning as L
import pytest
import torch
from lightning.pytorch.demos import LightningTransformer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from toy import Incoming, make_trainer, weights

from lightning_odem import ContinualMergeCallback

transformers = pytest.importorskip("transformers")
models = pytest.importorskip("torchvision.models.resnet")

pytestmark = pytest.mark.usefixtures("small_stream")

CLASSES, LENGTH, SAMPLES = 5, 6, 48


def stream(module, data):
    """Merge three tasks into a module, and check what holds for every stream."""
    merge, incoming = ContinualMergeCallback(), Incoming()
    for number in range(3):
        make_trainer(incoming, merge, max_epochs=1).fit(module, *data(number))
    report, merged = merge.report, weights(module)
    assert report.tasks == ["task_1", "task_2", "task_3"]
    assert [record.t for record in report.merges] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert all(record.path["loss"] for record in report.merges[1:])
    assert all(value.isfinite().all() for value in merged.values())
    base = incoming.starts[0]
    for model in (base, incoming.models[-1]):
        assert not all(torch.equal(merged[name], model[name]) for name in merged)
    # A merge starts from the base model anew, and moves what was trained.
    assert all(torch.equal(start[name], base[name]) for start in incoming.starts for name in merged)
    return merge, incoming


def tokens(number):
    """Sequences, and of each token a class that depends on the task."""
    ids = torch.randint(1, 20, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(number))
    return ids, (ids + number) % CLASSES


class Demo(LightningTransformer):
    """Lightning's language model, which calls ``view`` on its targets; without its download."""

    def __init__(self):
        super().__init__(vocab_size=20)

    def prepare_data(self):
        pass


@pytest.mark.slow
def test_lightnings_own_language_model_is_merged():
    """Its forward takes two arguments, so there is no accuracy to measure."""
    merge, _ = stream(Demo(), lambda number: [DataLoader(TensorDataset(*tokens(number)), 16)])
    assert torch.tensor(merge.report.accuracy[-1]).isnan().all()


class Labelled(L.LightningModule):
    """A model of transformers, on batches that are its keyword arguments."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def prediction_step(self, batch, task):
        labels = batch.pop("labels")
        return self.model(**batch, labels=labels).logits.flatten(0, 1), labels.view(-1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def labelled(number):
    """Dataloaders of dictionaries, for training and for validation."""
    loader = DataLoader([{"input_ids": ids, "labels": labels} for ids, labels in zip(*tokens(number), strict=True)], 16)
    return loader, loader


TINY = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_token_classifier_is_merged():
    config = transformers.BertConfig(**TINY, num_labels=CLASSES)
    merge, _ = stream(Labelled(transformers.BertForTokenClassification(config)), labelled)
    accuracies = [*merge.report.fine_tuned, *merge.report.accuracy[-1]]
    assert all(0.0 <= accuracy <= 1.0 for accuracy in accuracies)
    assert min(merge.report.fine_tuned) > max(merge.report.pretrained)


def test_an_encoder_decoder_with_tied_embeddings_is_merged_and_stays_tied():
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    module = Labelled(transformers.T5ForConditionalGeneration(config))
    merge, incoming = stream(module, labelled)
    shared, names = module.model.shared.weight, ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    assert all(module.get_submodule(f"model.{name}").weight is shared for name in names)
    assert "model.shared.weight" in merge.state_dict()["merged"]
    assert not [name for name in merge.state_dict()["merged"] if name.startswith(tuple(f"model.{n}" for n in names))]
    fresh = Labelled(transformers.T5ForConditionalGeneration(config))
    merge.load_task(fresh, "task_3")
    assert torch.equal(fresh.model.lm_head.weight, shared)
    assert fresh.model.lm_head.weight is fresh.model.shared.weight


class Notes(set):
    """What a test writes down; plain sets of a module are put back after a merge."""


class Images(L.LightningModule):
    """A network of torchvision on images that come channels last."""

    def __init__(self):
        super().__init__()
        self.net = models.ResNet(models.BasicBlock, [1, 1, 1, 1], CLASSES).to(memory_format=torch.channels_last)
        self.seen = Notes()

    def forward(self, images):
        self.seen.add((images.is_contiguous(memory_format=torch.channels_last), images.dtype))
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def images(number):
    """Dataloaders of images whose mean tells their class."""
    targets = torch.arange(SAMPLES) % CLASSES
    noise = torch.randn(SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(number))
    levels = torch.roll(torch.arange(CLASSES), number)[targets].view(-1, 1, 1, 1)
    dataset = TensorDataset((levels + noise).to(memory_format=torch.channels_last), targets)

    def collate(samples):
        inputs, targets = zip(*samples, strict=True)
        return torch.stack(inputs).to(memory_format=torch.channels_last), torch.stack(targets)

    loader = DataLoader(dataset, 16, collate_fn=collate)
    return loader, loader


@pytest.mark.slow
def test_a_residual_network_on_images_that_come_channels_last_is_merged():
    module = Images()
    merge, incoming = stream(module, images)
    assert module.seen == {(True, torch.float32)}
    assert all(
        parameter.is_contiguous(memory_format=torch.channels_last) for parameter in module.net.conv1.parameters()
    )
    statistics = {name: value for name, value in module.state_dict().items() if name.endswith("running_mean")}
    for model in (incoming.starts[0], incoming.models[-1]):
        assert not all(torch.equal(value, model[name]) for name, value in statistics.items())
    assert all(0.0 <= accuracy <= 1.0 for accuracy in merge.report.accuracy[-1])

"""The models of ``flow_times.py``, modules that count their passes, and the same passes in a plain loop."""

from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import lightning as L
import timm
import torch
from cifar_resnet import CifarResNet
from torch import nn

from lightning_odem.classifiers import PixelClassifier

SEEN = Counter()  # samples by whether the pass had a gradient, and by the size of its batch


class Classifier(L.LightningModule):
    def __init__(self, name):
        super().__init__()
        shapes = {"test_vit": (1, 32, 32), "resnet20": (3, 32, 32), "quickstart": (1, 24, 24)}
        self.shape = shapes.get(name, (128,))
        if name == "resnet20":
            self.model = nn.Sequential(CifarResNet(20), nn.Linear(64, 10))
        elif name == "quickstart":
            self.model = PixelClassifier(pixels=576, num_classes=10)
        elif name == "test_vit":
            self.model = timm.create_model("test_vit", in_chans=1, img_size=32, num_classes=10)
        elif name == "minilm" or Path(name).is_dir():
            import transformers as hf

            kind, small = hf.AutoModelForSequenceClassification, {"hidden_size": 384, "intermediate_size": 1536}
            known = name != "minilm" and kind.from_pretrained(name, num_labels=10)
            self.model = known or kind.from_config(hf.BertConfig(num_hidden_layers=6, num_labels=10, **small))
        else:
            self.model = timm.create_model(name, num_classes=10)
            self.shape = self.model.pretrained_cfg["input_size"]

    def draw(self, n):
        inputs = torch.randn(n, *self.shape) if len(self.shape) == 3 else torch.randint(1, 30000, (n, *self.shape))
        return inputs, torch.arange(n) % 10

    def training_step(self, batch, batch_idx=0):
        SEEN[torch.is_grad_enabled(), len(batch[1])] += len(batch[1])
        scores = self.model(batch[0])
        return nn.functional.cross_entropy(getattr(scores, "logits", scores), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


def passes(module, plugin, drawn, made):
    """As many samples as ``made`` counts, in batches of the same sizes, through a module in a plain loop."""
    module.zero_grad()
    for (gradient, size), samples in made.items():
        batches = zip(*(part.split(size) for part in drawn), strict=True)
        whole = cycle([batch for batch in batches if len(batch[1]) == size])
        for batch in islice(whole, round(samples / size)):
            with torch.set_grad_enabled(gradient), plugin.forward_context():
                loss = module.training_step(batch)
            if gradient:
                loss.backward()

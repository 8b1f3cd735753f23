"""Text classification with transformers: batches are what a tokenizer gives, the score is the module's own F1.

A tokenizer collates texts into a ``BatchEncoding``, padded to the longest of the batch; the calibration makes such
batches again. Tasks have different numbers of classes: each keeps its own classifier (``exclude``), and a new one is
put in before its training. ``monitor="val/f1"`` takes the score from the validation of the module.
The encoder is a small BERT from a config; ``text_classification.py`` has a pretrained one, files, and the command line.
Run it with ``python examples/sentence_classification.py``; it needs transformers and half a minute, and no download.
"""

import random

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from lightning_odem import ContinualMergeCallback

TASKS = {  # for each class the words that tell it
    "mood": ["good nice lovely happy", "bad poor awful sad"],
    "topic": ["ball goal team race", "vote law party state", "cell atom lab data"],
    "size": ["big huge tall wide", "tiny small short thin"],
}
FILLERS = ["the", "a", "this", "it", "was", "is", "very", "and", "then", "of", "for", "with"]
WORDS = ["[PAD]", *FILLERS, *(word for task in TASKS.values() for each in task for word in each.split())]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)})), pad_token="[PAD]"
)
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def sentences(task: str, count: int, seed: int) -> list[tuple[str, int]]:
    """Texts in which two words tell the class and one word, in every third text, another class."""
    draw, classes, made = random.Random(seed), list(map(str.split, TASKS[task])), []
    for number in range(count):
        label = number % len(classes)
        others = draw.choices(classes[label - 1], k=number % 3 == 0) + draw.choices(FILLERS, k=3 + number % 8)
        draw.shuffle(words := draw.choices(classes[label], k=2) + others)
        made.append((" ".join(words), label))
    return made


def collate(samples: list[tuple[str, int]]) -> BatchEncoding:
    texts, labels = zip(*samples, strict=True)
    return BatchEncoding({**tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)})


class Texts(L.LightningDataModule):
    def __init__(self, task: str) -> None:
        super().__init__()
        self.task_name = task

    def train_dataloader(self) -> DataLoader:
        return DataLoader(sentences(self.task_name, 480, seed=0), batch_size=24, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(sentences(self.task_name, 120, seed=1), batch_size=60, collate_fn=collate)


class SentenceClassifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model = BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **shape))

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(
            self.model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]
        )

    def on_validation_epoch_start(self) -> None:
        self.f1 = MulticlassF1Score(len(self.model.classifier.bias)).to(self.device)

    def validation_step(self, batch: BatchEncoding, batch_idx: int) -> None:
        self.f1.update(self.model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        self.log("val/f1", self.f1.compute())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    L.seed_everything(0)
    model = SentenceClassifier()
    merge = ContinualMergeCallback(calibration_size=150, exclude=["model.classifier"], monitor="val/f1")
    for task, classes in TASKS.items():
        model.model.classifier = nn.Linear(48, len(classes))
        trainer = L.Trainer(max_epochs=6, callbacks=[merge], logger=False, enable_checkpointing=False)
        trainer.fit(model, datamodule=Texts(task))
    print(merge.table())


if __name__ == "__main__":
    main()

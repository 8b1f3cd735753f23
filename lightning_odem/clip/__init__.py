"""CLIP with zero-shot heads, through transformers, an optional dependency."""

from lightning_odem.clip.classifier import ClipClassifier

__all__ = ["ClipClassifier"]

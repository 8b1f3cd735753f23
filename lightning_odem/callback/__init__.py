"""The callback that merges each fine-tuned model: when things happen in a Trainer's life."""

from lightning_odem.callback.callback import ContinualMergeCallback

__all__ = ["ContinualMergeCallback"]

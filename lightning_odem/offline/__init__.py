"""Merging checkpoints that exist already."""

from lightning_odem.offline.checkpoint import read_checkpoint

__all__ = ["read_checkpoint"]

"""Calibration samples in the memory of a GPU while one merge goes through them."""

from dataclasses import replace

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_odem.calibration.buffer import CalibrationBuffer
from lightning_odem.calibration.samples import TaskSamples

# Activations need memory too, and how much is not known before the first pass.
_SHARE_OF_FREE = 0.25


def may_move(module: L.LightningModule) -> bool:
    """Whether samples may be on the device before a module's and its datamodule's hooks for batches run.

    ``on_after_batch_transfer`` runs in every pass in any case, so augmentations in it stay random. The two hooks before
    it may expect samples on the CPU.
    """
    owners = [module, getattr(module.trainer, "datamodule", None)]
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device")
    return not any(is_overridden(hook, owner) for owner in owners if owner is not None for hook in hooks)


def on_device(buffer: CalibrationBuffer, device: torch.device) -> CalibrationBuffer:
    """A copy of the buffer with the large parts of its samples on a device, if they take a quarter of what is free.

    Large parts are images and other inputs that are not integers. Labels and token ids stay on the CPU, where they are
    read without waiting for a device, and so do samples that are collated anew in each pass.

    Args:
        buffer: The samples, on the CPU.
        device: The module's device; if it is the CPU, the buffer itself is returned.
    """
    if device.type == "cpu":
        return buffer
    whole = buffer.micro_batches(max(len(buffer), 1))
    needed = sum(leaf.nbytes for batch in whole for leaf in tree_leaves(batch.samples) if _is_large(leaf))
    free = _free_bytes(device)
    if needed > _SHARE_OF_FREE * free:
        where = f"stay on the CPU, since {device} has {free / 2**20:.0f} MiB free"
        rank_zero_info(f"Calibration samples of {needed / 2**20:.0f} MiB {where}.")
        return buffer
    rank_zero_info(f"Calibration samples of {needed / 2**20:.0f} MiB are on {device} during the merge.")

    def move(task: str, held: TaskSamples) -> TaskSamples:
        return replace(held, samples=tree_map(lambda leaf: leaf.to(device) if _is_large(leaf) else leaf, held.samples))

    return buffer.changed(move)


def _is_large(leaf: object) -> bool:
    """Whether a part of the samples is a tensor to move; :class:`~lightning_odem.calibration.batches.Kept` is none."""
    if not isinstance(leaf, Tensor):
        return False
    return leaf.is_floating_point() or (leaf.dtype == torch.uint8 and leaf.dim() > 1)


def _free_bytes(device: torch.device) -> float:
    """Bytes that tensors can take: what the device has free, and what torch holds of it without using it."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused

"""Blocks of the parameters in which the transport is rectified."""

import math

import torch

from lightning_odem.flow import RectifiedField
from lightning_odem.flow.blocks import alone
from lightning_odem.methods.base import MergeContext

GRANULARITIES = ("vector", "tensor", "row", "coordinate")


def rectified_field(context: MergeContext, granularity: str, device: torch.device) -> RectifiedField:
    """The field whose blocks are the vector, the entries, or the parameters or their rows.

    Args:
        context: The parameters' shapes, and how processes share them.
        granularity: One of :data:`GRANULARITIES`, see :class:`~lightning_odem.PaperODEMerge`.
        device: Where the vectors are.
    """
    sum_ = context.sum_ or alone
    if granularity not in ("tensor", "row"):
        return RectifiedField(granularity, sum_)
    shards = context.shards
    lengths, split = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.bool)]
    for shape, part in zip(context.shapes, context.local_shapes, strict=True):
        size, by_row = math.prod(part), granularity == "row" and len(shape) > 1
        # Shards are cut between rows: a row lies in one shard, a parameter without rows may lie in all of them.
        if size or (shards is not None and not by_row):
            rows = part[0] if by_row else 1
            lengths.append(torch.full((rows,), size // rows))
            split.append(torch.full((rows,), not by_row))
    return RectifiedField(torch.cat(lengths).to(device), sum_, torch.cat(split) if shards is not None else None)

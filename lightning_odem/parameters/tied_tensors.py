"""Tensors that a model stores twice, or once for two places."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def copies(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find floating tensors that are copies of an earlier one, by name; constants (ones of a norm) are none.

    Example:
        >>> copies({"wte": torch.tensor([1.0, 2.0]), "norm": torch.ones(2), "head": torch.tensor([1.0, 2.0])})
        {'head': 'wte'}
    """
    found: dict[str, str] = {}
    seen: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        flat = tensor.flatten()
        # Most tensors differ at the first look, so that not all of them are read.
        key = (tensor.shape, tensor.dtype, *flat[:4].tolist(), float(flat[-1]))
        for other in seen.setdefault(key, []):
            if torch.equal(tensors[other], tensor) and bool((flat != flat[0]).any()):
                found[name] = other
                break
        else:
            seen[key].append(name)
    return found


def fill_tied(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], shapes: Mapping[str, torch.Size], tied: Mapping[str, str]
) -> dict[str, Tensor]:
    """Give a model the copies that another one stores, and take away those that it does not.

    Args:
        tensors: The model.
        names: Its name for each tensor of the other model.
        shapes: Shapes of the other model's tensors.
        tied: The other model's name of a copy, and the name of what it is a copy of.
    """
    filled = dict(tensors)
    if missing := [name for name in shapes if names[name] not in tensors]:
        for name, partner in [*tied.items(), *((there, here) for here, there in tied.items())]:
            if name in missing and names[partner] in tensors:
                filled[names[name]] = tensors[names[partner]]
    if more := tensors.keys() - set(names.values()):
        for name, partner in copies(tensors).items():
            # Of two copies, the one goes that the other model does not know.
            for extra, kept in ((name, partner), (partner, name)):
                if extra in more and kept not in more:
                    filled.pop(extra, None)
    return filled


def fill_head(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], shapes: Mapping[str, torch.Size], missing: Collection[str]
) -> dict[str, Tensor]:
    """Give a model that ties its output weights to its embedding a tensor of its own for them.

    It is filled in only if a single other matrix of the model has its shape.
    """
    filled = dict(tensors)
    for name in missing:
        same = [there for there, tensor in tensors.items() if len(shapes[name]) == 2 and tensor.shape == shapes[name]]
        if len(same) == 1:
            filled[names[name]] = tensors[same[0]]
    return filled

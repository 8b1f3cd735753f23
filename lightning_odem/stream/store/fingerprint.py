"""The fingerprint of a model, and the differences between two models, bit for bit."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(snapshot: Mapping[str, Tensor]) -> str:
    """SHA-256 of a model's tensors, sorted by name: names, shapes, dtypes and bytes.

    Example:
        >>> model = {"weight": torch.ones(2), "bias": torch.zeros(1)}
        >>> fingerprint(model) == fingerprint(dict(reversed(model.items())))
        True
    """
    return hash_tensors(dict(sorted(snapshot.items())))


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors in the given order: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """The differences between two models, for a message; empty if and only if their fingerprints are equal.

    Example:
        >>> differences({"a": torch.zeros(2), "b": torch.ones(1)}, {"a": torch.tensor([0.0, 0.25]), "c": torch.ones(1)})
        ['1 of 2 tensors missing: b', '1 tensor more: c', '1 of 1 common tensors differs: a by up to 0.25']
    """
    missing = [name for name in expected if name not in found]
    more = [name for name in found if name not in expected]
    common = [name for name in expected if name in found]
    different = [name for name in common if not _same(expected[name], found[name])]
    lines = []
    if missing:
        lines.append(f"{len(missing)} of {_tensors(len(expected))} missing: {_some(missing)}")
    if more:
        lines.append(f"{_tensors(len(more))} more: {_some(more)}")
    if different:
        first = different[0]
        verb = "differs:" if len(different) == 1 else "differ, first"
        how = _difference(expected[first], found[first])
        lines.append(f"{len(different)} of {len(common)} common tensors {verb} {first} {how}")
    return lines


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _same(expected: Tensor, found: Tensor) -> bool:
    same_kind = expected.shape == found.shape and expected.dtype == found.dtype
    return same_kind and torch.equal(_bytes(expected), _bytes(found))


def _difference(expected: Tensor, found: Tensor) -> str:
    if expected.shape != found.shape:
        return f"in shape, {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"in dtype, {found.dtype} instead of {expected.dtype}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    return f"by up to {(found.cpu().to(wide) - expected.cpu().to(wide)).abs().max().item():.3g}"


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

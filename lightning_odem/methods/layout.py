"""Flat vectors seen as the tensors they are made of, weight matrices apart from the rest."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_odem.methods.base import MergeContext
from lightning_odem.parameters import is_excluded


def tensors(vector: Tensor, context: MergeContext) -> dict[str, Tensor]:
    """The pieces of a flat vector by parameter name, in the parameters' shapes; they share its memory.

    Example:
        >>> import torch
        >>> context = MergeContext(["weight", "bias"], [(2, 2), (2,)])
        >>> tensors(torch.arange(6.0), context)["bias"]
        tensor([4., 5.])
    """
    shapes = context.local_shapes
    pieces = vector.split([math.prod(shape) for shape in shapes])
    return {name: piece.view(shape) for name, piece, shape in zip(context.names, pieces, shapes, strict=True)}


def weight_matrices(
    context: MergeContext, layers: Sequence[str] | None = None, *, convolutions: bool = True
) -> list[str]:
    """Names of the parameters that are weight matrices: at least two dimensions, out x (everything else), both above 1.

    So a convolution counts as the matrix [out, in * kh * kw], while a position embedding [1, n, d] and a layer of one
    output are vectors. Shapes cannot tell an embedding table [n, d] from a linear layer; ``layers`` can.

    Args:
        context: Names and shapes of the merged parameters.
        layers: Only those that match one of these patterns, see :func:`~lightning_odem.parameters.is_excluded`;
            None takes all.
        convolutions: Whether parameters of more than two dimensions count.

    Raises:
        ValueError: If a pattern matches none of them: most often a misspelt name.

    Example:
        >>> shapes = [(8, 3, 3, 3), (8,), (1, 16, 8), (4, 8)]
        >>> context = MergeContext(["conv.weight", "conv.bias", "position", "fc.weight"], shapes)
        >>> weight_matrices(context), weight_matrices(context, ["fc"])
        (['conv.weight', 'fc.weight'], ['fc.weight'])
    """
    names = [
        name
        for name, shape in zip(context.names, context.shapes, strict=True)
        if len(shape) >= 2 and min(shape[0], math.prod(shape[1:])) > 1 and (convolutions or len(shape) == 2)
    ]
    if layers is None:
        return names
    idle = [pattern for pattern in layers if not any(is_excluded(name, [pattern]) for name in names)]
    if idle:
        raise ValueError(f"layers={idle} matches no weight matrix; the weight matrices are: {', '.join(names)}.")
    return [name for name in names if is_excluded(name, layers)]


def matrices(context: MergeContext, names: Sequence[str], *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk through weight matrices: for each name its views [rows, columns] in all vectors, which share their memory.

    Tells ``context.on_step`` how many are done.
    """
    pieces = [tensors(vector, context) for vector in vectors]
    for index, name in enumerate(names):
        if context.on_step:
            context.on_step(index, len(names))
        yield tuple(piece[name].flatten(1) for piece in pieces)
    if context.on_step:
        context.on_step(len(names), len(names))


PACKED = ("in_proj_weight", "qkv.weight")
"""How the names end of attention weights [3 * d, d] that hold the layers of queries, keys and values."""


def parts(
    context: MergeContext, names: Sequence[str], *vectors: Tensor
) -> Iterator[tuple[str, int, tuple[Tensor, ...]]]:
    """Walk through weight matrices as :func:`matrices`, each packed attention weight as the three that it holds.

    So a network merges alike however its attention is written.

    Yields:
        A key, the name of the parameter and in packed ones the number of the part; the number of rows of the whole
        matrix; and the views [rows, columns], of a matrix that processes share those of this process's rows.
    """
    whole = dict(zip(context.names, context.shapes, strict=True))
    for name, views in zip(names, matrices(context, names, *vectors), strict=True):
        total = whole[name][0]
        number = 3 if name.endswith(PACKED) and total % 3 == 0 else 1
        size, first = total // number, 0 if context.shards is None else context.shards.first_row(name)
        for index in range(number):
            begin, end = (min(max(row - first, 0), len(views[0])) for row in (index * size, (index + 1) * size))
            key = name if number == 1 else f"{name}:{index}"
            yield key, size, tuple(view[begin:end] for view in views)


def others(context: MergeContext, names: Sequence[str], *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk through the tensors that are not among ``names``: for each its views in all vectors."""
    pieces = [tensors(vector, context) for vector in vectors]
    for name in context.names:
        if name not in names:
            yield tuple(piece[name] for piece in pieces)

"""Views of flat vectors as the tensors they consist of; weight matrices are kept apart from the rest."""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_odem.methods.base import MergeContext
from lightning_odem.methods.linalg import norm
from lightning_odem.parameters.vector import is_excluded


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
    """List the parameters that are weight matrices: at least two dimensions, out x (everything else), both above 1.

    So a convolution counts as the matrix [out, in * kh * kw], while a position embedding [1, n, d] and a layer with one
    output are vectors. If the context knows the groups of a grouped convolution, each group is a matrix; a depth-wise
    convolution then holds vectors. Shapes cannot tell an embedding table [n, d] from a linear layer; ``layers`` can.

    Args:
        context: Names and shapes of the merged parameters.
        layers: Only those that match one of these patterns, see :func:`~lightning_odem.parameters.vector.is_excluded`;
            None takes all.
        convolutions: Whether parameters of more than two dimensions count.

    Raises:
        ValueError: If a pattern matches none of them; most often a name is misspelt.

    Example:
        >>> shapes = [(8, 3, 3, 3), (8,), (1, 16, 8), (4, 8)]
        >>> context = MergeContext(["conv.weight", "conv.bias", "position", "fc.weight"], shapes)
        >>> weight_matrices(context), weight_matrices(context, ["fc"])
        (['conv.weight', 'fc.weight'], ['fc.weight'])
    """
    held = set(context.names)
    return [name for name in all_weight_matrices(context, layers, convolutions=convolutions) if name in held]


def all_weight_matrices(
    context: MergeContext, layers: Sequence[str] | None = None, *, convolutions: bool = True
) -> list[str]:
    """List the weight matrices of the whole model, also those that are not in the vectors; see above."""
    names = [
        name
        for name, shape in context.all_shapes.items()
        if len(shape) >= 2
        and min(shape[0] // context.groups.get(name, 1), math.prod(shape[1:])) > 1
        and (convolutions or len(shape) == 2)
    ]
    if layers is not None:
        idle = [pattern for pattern in layers if not any(is_excluded(name, [pattern]) for name in names)]
        if idle:
            raise ValueError(f"layers={idle} matches no weight matrix; the weight matrices are: {', '.join(names)}.")
        names = [name for name in names if is_excluded(name, layers)]
    return names


def matrices(context: MergeContext, names: Sequence[str], *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk through weight matrices: for each name, yield its views [rows, columns] in all vectors. They share memory.

    ``context.on_step`` is told how many are done.
    """
    pieces = [tensors(vector, context) for vector in vectors]
    for index, name in enumerate(names):
        if context.on_step:
            context.on_step(index, len(names))
        yield tuple(piece[name].flatten(1) for piece in pieces)
    if context.on_step:
        context.on_step(len(names), len(names))


PACKED = ("in_proj_weight", "qkv.weight", "c_attn.weight")
"""Endings of the names of attention weights that hold the layers of queries, keys and values side by side."""


class Part(NamedTuple):
    """A matrix within a parameter.

    Args:
        key: The name of the parameter, followed by the number if it holds several matrices.
        name: The name of the parameter.
        number: Which of the parameter's matrices this is.
        rows: Number of rows of the whole matrix; a process that has shards may hold only some of them.
    """

    key: str
    name: str
    number: int
    rows: int


def parameter_of(key: str, names: Container[str]) -> str | None:
    """The parameter to which an entry of a method's state belongs, if it is one of some names.

    Its key is the parameter's name or the key of a :class:`Part`. A word and a slash may stand before it.

    Example:
        >>> [parameter_of(key, ["w"]) for key in ("w", "w:2", "moments/w:2", "norm")]
        ['w', 'w', 'w', None]
    """
    ends = [key, *(key[index + 1 :] for index, letter in enumerate(key) if letter == "/")]
    candidates = (name for end in ends for name in (end, end.rpartition(":")[0]))
    return next((name for name in candidates if name in names), None)


def parts(
    context: MergeContext, names: Sequence[str], *vectors: Tensor, outputs_first: bool = False
) -> Iterator[tuple[Part, tuple[Tensor, ...]]]:
    """Walk through weight matrices like :func:`matrices`, but split parameters that hold several of them.

    A packed attention weight holds two or three layers, and a grouped convolution a matrix for each group. So the merge
    of a network does not depend on how its layers are written.

    Args:
        context: Names, shapes, groups and transposed weights.
        names: The parameters.
        *vectors: Flat vectors.
        outputs_first: Give matrices [out, in] also for weights that are stored as [in, out]. With shards, a process
            would hold columns of these matrices.

    Yields:
        The part, and its views [rows, columns]. If processes share the matrix, the views hold this process's rows.
    """
    whole = dict(zip(context.names, context.shapes, strict=True))
    for name, views in zip(names, matrices(context, names, *vectors), strict=True):
        rows, columns = whole[name][0], math.prod(whole[name][1:])
        transposed, groups = name in context.transposed, context.groups.get(name, 1)
        layers = _packed_layers(name, *((columns, rows) if transposed else (rows, columns))) if groups == 1 else 1
        # Groups lie along the first dimension, layers along the outputs.
        down, across = (groups, layers) if transposed else (groups * layers, 1)
        height, width = rows // down, columns // across
        first = 0 if context.shards is None else context.shards.first_row(name)
        for index in range(down * across):
            row, column = divmod(index, across)
            begin, end = (min(max(edge - first, 0), len(views[0])) for edge in (row * height, (row + 1) * height))
            cut = [view[begin:end, column * width : (column + 1) * width] for view in views]
            key = name if down * across == 1 else f"{name}:{index}"
            flip = transposed and outputs_first
            yield Part(key, name, index, height), tuple(view.T if flip else view for view in cut)


def _packed_layers(name: str, outputs: int, inputs: int) -> int:
    """How many layers a parameter holds side by side, as its name and shape tell."""
    if not name.endswith(PACKED):
        return 1
    if name.endswith("c_attn.weight"):  # keys and values only: the queries come from elsewhere
        return outputs // inputs if outputs in (2 * inputs, 3 * inputs) else 1
    return 3 if outputs % 3 == 0 else 1


def squares(context: MergeContext, vector: Tensor, names: Sequence[str] | None = None) -> Tensor:
    """The squared norm of each parameter of the whole model [p]: 0 for those that are not in a vector, or not named."""
    found = torch.zeros(len(context.all_shapes), dtype=torch.float64)
    place = {name: index for index, name in enumerate(context.all_shapes)}
    for name, piece in tensors(vector, context).items():
        if names is None or name in names:
            found[place[name]] = norm(piece.flatten()) ** 2
    return found


def whole_norms(context: MergeContext, compute: Callable[[], Sequence[Tensor]]) -> list[float]:
    """Norms of vectors of the whole model, each from its :func:`squares`.

    The sum is rounded once, so it does not depend on which parameters are merged together.

    Example:
        >>> context = MergeContext(["weight", "bias"], [(1,), (1,)])
        >>> vector = torch.tensor([3.0, 4.0])
        >>> whole_norms(context, lambda: [squares(context, vector), squares(context, vector, ["bias"])])
        [5.0, 4.0]
    """
    summed = context.summed(lambda: torch.stack(list(compute())))
    return [math.sqrt(math.fsum(row)) for row in summed.tolist()]


def others(context: MergeContext, names: Sequence[str], *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk through the tensors that are not among ``names``: for each, yield its views in all vectors."""
    pieces = [tensors(vector, context) for vector in vectors]
    for name in context.names:
        if name not in names:
            yield tuple(piece[name] for piece in pieces)

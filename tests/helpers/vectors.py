"""Random models as flat vectors, for tests of merge methods."""

import math

import torch

from lightning_odem.flow import operating_time
from lightning_odem.methods import MergeContext
from lightning_odem.methods.needs import BaseModel

SHAPES = {
    "conv.weight": (6, 3, 2, 2),
    "conv.bias": (6,),
    "position": (1, 3, 6),
    "tall.weight": (9, 5),
    "wide.weight": (4, 12),
    "wide.bias": (4,),
}
MATRICES = ["conv.weight", "tall.weight", "wide.weight"]


def make_models(number=4, dtype=torch.float64, seed=0, shapes=SHAPES):
    """A base model and models fine-tuned from it: vectors near the base one, the later ones further away."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(math.prod(shape) for shape in shapes.values())
    base = torch.randn(size, generator=generator, dtype=torch.float64)
    models = [
        base + 0.1 * (1 + index) * torch.randn(size, generator=generator, dtype=torch.float64)
        for index in range(number)
    ]
    return base.to(dtype), [model.to(dtype) for model in models]


def make_context(base, shapes=SHAPES, needed=None, **settings):
    return MergeContext(list(shapes), list(shapes.values()), needed={BaseModel: base, **(needed or {})}, **settings)


def merge_stream(method, base, models, weights=None, shapes=SHAPES, **settings):
    """The merged model after each task."""
    context = make_context(base, shapes, **settings)
    weights = weights or [1.0] * len(models)
    merged = [method.start(models[0].clone(), context).theta.clone()]
    for k in range(1, len(models)):
        t = operating_time(weights[: k + 1])
        merged.append(method.merge(merged[-1].clone(), models[k], t, context).theta.clone())
    return merged


def unflatten(vector, shapes=SHAPES):
    """Copies of the tensors in a vector, in fp64 and by name."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    pieces = vector.double().split(sizes)
    return {name: piece.reshape(shape).clone() for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def flatten(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])

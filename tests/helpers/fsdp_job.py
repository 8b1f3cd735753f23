"""What the processes of a job do in tests of merges on sharded parameters; a single process does it on whole ones."""

import math
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.calibration.batches import count
from lightning_odem.calibration.scaling import LossScale
from lightning_odem.flow import ReusedGradient, StepControl
from lightning_odem.methods import (
    AverageMerge,
    IsotropicMerge,
    LinearInterpolation,
    MagMaxMerge,
    MergeContext,
    ODEMerge,
    PaperODEMerge,
    TaskArithmeticMerge,
    TiesMerge,
)
from lightning_odem.methods.needs import BaseModel, Calibration
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.snapshot import cut_snapshot, gather_snapshot, load_snapshot, take_snapshot, undisturbed
from lightning_odem.parameters.vector import ParameterVector

FP64 = torch.float64
# Of the first not every process has a sample.
SAMPLES = {"rare": 1, "old": 8, "new": 7}
GRANULARITIES = ("vector", "tensor", "row", "coordinate")
METHODS = {
    "average": AverageMerge(),
    "interpolation": LinearInterpolation(0.3),
    "magmax": MagMaxMerge(),
    "task_arithmetic": TaskArithmeticMerge(),
    "task_arithmetic sum": TaskArithmeticMerge(recursion="sum"),
    "ode": ODEMerge(batch_size=8, descent=0.02),
    "isotropic": IsotropicMerge(0.5),
    "ties": TiesMerge(),
    "ode_paper search": PaperODEMerge(0.25, solver=ReusedGradient(times=2), operating_time="search"),
    "ode_paper became": PaperODEMerge(0.25, operating_time="became", step_control=StepControl()),
    "ode_paper heun": PaperODEMerge(0.25, solver="heun"),
    **{f"ode_paper {blocks}": PaperODEMerge(0.25, granularity=blocks) for blocks in GRANULARITIES},
}


class Net(nn.Module):
    """A small transformer whose parameters have 18, 6, 5 and 1 rows: even shards, uneven ones and empty ones."""

    def __init__(self, seed=0, dtype=FP64, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(4, width)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 5, dropout=0.0, batch_first=True, bias=False)
        self.head = nn.Linear(3 * width, 5)
        # Biases of attention are left out: the loss does not depend on those of the keys, whose gradients are rounding
        # alone, which signs and Adam make as large as any.
        self.scale = nn.Parameter(torch.ones(1) + 0.1 * seed)
        self.register_buffer("mean", torch.tensor([0.5, 0.1, 0.0, seed]))
        self.to(dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, inputs):
        return self.scale * self.head(self.encoder(self.embed(inputs - self.mean)).flatten(1))


def sharded(net):
    """A net whose parameters all processes share; as it is in a single process."""
    if dist.is_initialized():
        fully_shard(net.encoder)
        fully_shard(net)
    return net


class ShardedObjective(CalibrationObjective):
    """Each process takes its part of every micro-batch, so that all of them run as many passes over the same tasks."""

    def losses(self, theta, batches):
        with self._pass(theta), torch.no_grad():
            self.loss_evaluations += 1
            own = self._own(batches)
            sums = torch.as_tensor(self._losses(own), dtype=FP64)
            sums *= torch.tensor(
                [part.share / batch.share for part, batch in zip(own, batches, strict=True)], dtype=FP64
            )
            self.vector.shards.sum_(sums)
            return sums.tolist()

    def _differentiate_together(self, batches, scale):
        loss, grad = self._differentiate(self._own(batches), scale)
        sums = torch.tensor([loss], dtype=FP64)
        self.vector.shards.sum_(sums)
        return sums.item(), grad

    def _own(self, batches):
        own = []
        for batch in batches:
            n = count(batch.samples)
            first, last = (n * rank // self.processes.size for rank in (self.processes.rank, self.processes.rank + 1))
            piece = batch.view(slice(first, last) if first < last else slice(0, 1))
            own.append(replace(piece, share=batch.share * (last - first) / n))
        return own


def make_objective(net, dtype=FP64):
    generator = torch.Generator().manual_seed(1)
    buffer = CalibrationBuffer(100, shares="utility")
    for number, (task, size) in enumerate(SAMPLES.items(), start=1):
        inputs = torch.randn(size, 3, 4, generator=generator, dtype=FP64).to(dtype)
        buffer.add(task, (inputs, torch.arange(size) % 5), weight=float(number))
    vector = ParameterVector(net)
    kind = CalibrationObjective if vector.shards is None else ShardedObjective
    return kind(vector, buffer, lambda batch: cross_entropy(net(batch.samples[0]), batch.samples[1]), 6)


def whole(net):
    """All tensors of a net in the first process, Nones in the others."""
    return dict(gather_snapshot(net, take_snapshot(net)))


def merge(names=tuple(METHODS), dtype=FP64):
    """What each method makes of three random models, and what it takes."""
    results = {}
    for name in names:
        net = sharded(Net(1, dtype))
        objective = make_objective(net, dtype)
        vector = objective.vector
        incoming = vector.read()
        merged, base = (vector.gather(dict(Net(seed, dtype).named_parameters())) for seed in (0, 2))
        shapes = [tuple(shape) for shape in vector.shapes]
        context = MergeContext(
            vector.names, shapes, needed={BaseModel: base, Calibration: objective}, shards=vector.shards
        )
        with undisturbed(net), counted_sums() as sums, longest_tensor(objective) as longest:
            result = deepcopy(METHODS[name]).merge(merged, incoming, 0.4, context)
            vector.write_(result.theta)
        results[name] = {
            "weights": whole(net),
            "t": result.t,
            "path": result.trajectory.as_dict() if result.trajectory else {},
            "longest": max(longest, default=0),
            "length": len(vector),
            "evaluations": (objective.gradient_evaluations, objective.loss_evaluations),
            "sums": sums,
        }
    return results


@contextmanager
def counted_sums():
    """Lengths of the tensors that go through all-reduces."""
    lengths, all_reduce = [], dist.all_reduce

    def counted(tensor, *arguments, **settings):
        lengths.append(tensor.numel())
        return all_reduce(tensor, *arguments, **settings)

    dist.all_reduce = counted
    try:
        yield lengths
    finally:
        dist.all_reduce = all_reduce


@contextmanager
def longest_tensor(objective):
    """Lengths of the memory of all tensors made outside of forward and backward passes."""
    lengths, losses = [], objective._losses

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result) if watching else ():
                if isinstance(leaf, torch.Tensor):
                    held = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
                    lengths.append(held.untyped_storage().nbytes() // held.itemsize)
            return result

    watching = True

    def unwatched(*arguments):
        nonlocal watching
        watching = False
        found = losses(*arguments)
        watching = True
        return found

    objective._losses = unwatched
    with Watch():
        yield lengths
    del objective._losses


def round_trip(source, target):
    """Load whole tensors from a file, pass them through shards, and save whole tensors."""
    net = sharded(Net(3))
    parts = cut_snapshot(net, load_file(source))
    load_snapshot(net, parts, lambda name: True)
    tensors = whole(net)
    if Processes.current().rank == 0:
        save_file(tensors, target)
    return {name: tuple(part.shape) for name, part in take_snapshot(net).items()}, [
        tensor is None for tensor in tensors.values()
    ]


def parameters():
    """What a vector of shards is, reads, writes and collects."""
    net, reference = sharded(Net(1)), Net(1)
    vector, expected = ParameterVector(net), ParameterVector(reference)
    inputs = torch.randn(6, 3, 4, dtype=FP64, generator=torch.Generator().manual_seed(0))
    rank, size = vector.shards.rank, vector.shards.size
    found = {
        "names": vector.names == expected.names,
        "shapes": vector.shapes == expected.shapes,
        "length": len(vector),
        "whole length": len(expected),
        "read": torch.equal(vector.read(), vector.gather(dict(reference.named_parameters()))),
        "gather of shards": torch.equal(vector.gather(take_snapshot(net)), vector.read()),
        "snapshot": sum(tensor.numel() for tensor in take_snapshot(net).values()),
    }
    # A forward pass without backward leaves whole parameters in the root.
    with torch.no_grad():
        net(inputs)
    found["whole in the root"] = not isinstance(net.scale, DTensor)
    vector.write_(vector.gather(dict(Net(2).named_parameters())))
    net.mean.copy_(Net(2).mean)
    with torch.no_grad():
        found["what was written counts"] = torch.allclose(net(inputs), Net(2)(inputs), rtol=1e-12)
        found["vector of a net with whole root"] = torch.equal(ParameterVector(net).read(), vector.read())
        net(inputs)
    found["snapshot of a net with whole root"] = all(
        tensor.shape == vector.shards.local_shapes[name]
        for name, tensor in take_snapshot(net).items()
        if name in vector.names
    )
    found["gradients"] = {}
    for case, prepare in {
        "mean": lambda: None,
        "sum": lambda: _divide(net, 1.0),
        "frozen": lambda: net.head.weight.requires_grad_(False),
        "thawed": lambda: net.head.weight.requires_grad_(True),
    }.items():
        prepare()
        other = Net(2)
        other.head.weight.requires_grad_(net.head.weight.requires_grad)
        vector, expected = ParameterVector(net), ParameterVector(other)
        before = [parameter.grad for parameter in net.parameters()]
        with vector.collect_gradient() as gradient:
            for batch in inputs.split(3):
                net(batch[rank::size] if rank < 3 else batch[:0]).square().sum().backward()
        with expected.collect_gradient() as summed:
            other(inputs).square().sum().backward()
        full = dict(zip(expected.names, expected.views(summed), strict=True))
        difference = (gradient - vector.gather(full)).abs().max() if len(vector) else 0.0
        same = all(now is then for now, then in zip((p.grad for p in net.parameters()), before, strict=True))
        found["gradients"][case] = float(difference / summed.abs().max()), same
    return found


def _divide(net, factor):
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
            module.set_gradient_divide_factor(factor)


def scale_losses():
    """A scale too large for the shard of one process; whether its gradient is the one without a scale, and passes."""
    net = sharded(Net(1, torch.float32))
    plain, scaled = make_objective(net, torch.float32), make_objective(net, torch.float32)
    loss_and_grad, rank = scaled._loss_and_grad, scaled.processes.rank

    def overflowing(theta, batches, scale):
        loss, grad = loss_and_grad(theta, batches, scale)
        if rank == 0 and scale > 4.0:
            grad[0] = math.inf
        return loss, grad

    scaled._loss_and_grad, scaled.loss_scale = overflowing, LossScale(16.0)
    theta = plain.vector.read()
    same = torch.equal(plain.loss_and_grad(theta)[1], scaled.loss_and_grad(theta)[1])
    return {"same": same, "scale": scaled.loss_scale.value, "passes": scaled.gradient_evaluations}


def refusals():
    """Messages of what is refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    partly, hybrid = Net(), Net()
    fully_shard(partly.encoder)
    fully_shard(hybrid, mesh=init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("outer", "inner")))
    columns, copies = (nn.Linear(2 * dist.get_world_size(), 2) for _ in range(2))
    columns.weight = nn.Parameter(distribute_tensor(columns.weight.detach(), mesh, [Shard(1)]))
    copies.weight = nn.Parameter(distribute_tensor(copies.weight.detach(), mesh, [Replicate()]))
    net = sharded(Net())
    vector, others = ParameterVector(net), dict(Net(width=8).named_parameters())
    attempts = {
        "partly": lambda: ParameterVector(partly),
        "excluded": lambda: ParameterVector(partly, exclude=["embed", "head", "scale"]) and None,
        "hybrid": lambda: ParameterVector(hybrid),
        "columns": lambda: ParameterVector(columns),
        "copies": lambda: take_snapshot(copies) and load_snapshot(copies, take_snapshot(copies), lambda name: True),
        "gather": lambda: vector.gather(others),
        "load": lambda: load_snapshot(net, {**take_snapshot(net), "scale": torch.ones(3)}, lambda name: True),
        "cut": lambda: cut_snapshot(net, others),
    }
    return {name: _message(attempt) for name, attempt in attempts.items()}


def _message(attempt):
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return None


def everything(source, target):
    """All of the above in one job: a process takes long to start."""
    return {
        "merge": merge(),
        "merge in fp32": merge(["ode", "ode_paper tensor"], torch.float32),
        "round trip": round_trip(source, target),
        "parameters": parameters(),
        "scale": scale_losses(),
        "refusals": refusals(),
    }

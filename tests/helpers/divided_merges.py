"""What the processes of a job do in tests of rules that look at one parameter at a time, on sharded parameters."""

import math
from pathlib import Path

import torch
from fsdp_job import Net, whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_odem.methods import (
    ClosedFormMerge,
    DOPMerge,
    MergeMethod,
    MergeResult,
    NUFILTMerge,
    OPCMMerge,
    TaskSingularVectorsMerge,
)
from lightning_odem.methods.linalg import norm
from lightning_odem.methods.needs import BaseModel, Need, Snapshots
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.stream import Stream
from lightning_odem.stream.trace import TrainingTrace

WEIGHTS = (1.0, 2.0, 0.5, 0.0)


class MeanNorm(MergeMethod):
    """The mean task vector, scaled to the mean norm of the task vectors; each parameter times its own size."""

    needs = (BaseModel(),)
    by_tensor = "sums"

    def __init__(self):
        self.norms = []

    def merge(self, merged, incoming, t, context):
        if t == 0.0:
            return MergeResult(merged)
        update, task_vector = merged - context[BaseModel], incoming - context[BaseModel]
        self.norms = [*(self.norms or [norm(update, context.sum_)]), norm(task_vector, context.sum_)]
        update.lerp_(task_vector, t)
        self.scale = sum(self.norms) / len(self.norms) / norm(update, context.sum_)
        return MergeResult(update.mul_(self.scale).add_(context[BaseModel]))

    def state_dict(self):
        # One of the parameters has the same name.
        return {"norms": self.norms, "scale": self.scale} if self.norms else {}

    def load_state_dict(self, state):
        assert state.keys() in (set(), {"norms", "scale"})
        self.norms, self.scale = list(state.get("norms", [])), state.get("scale")


class LargestOfRun(MergeMethod):
    """Moves to the weights of the run that are the largest; keeps how far each parameter has moved."""

    needs = (Snapshots(),)
    by_tensor = True

    def __init__(self):
        self.moved = {}

    def merge(self, merged, incoming, t, context):
        most = torch.stack([*context[Snapshots], incoming]).max(0).values
        sizes = [math.prod(shape) for shape in context.shapes]
        steps = dict(zip(context.names, (most - merged).split(sizes), strict=True))
        self.moved = self.moved | {
            f"moved/{name}": step.norm() + self.moved.get(f"moved/{name}", 0.0) for name, step in steps.items()
        }
        return MergeResult(merged.lerp_(most, t))

    def state_dict(self):
        return {"moved": self.moved} if self.moved else {}

    def load_state_dict(self, state):
        self.moved = dict(state.get("moved", {}))


METHODS = {
    "closed_form": ClosedFormMerge,
    "closed_form recursion": lambda: ClosedFormMerge(layers=["encoder"], recursion=True),
    "dop": lambda: DOPMerge(steps=3, lr=0.01),
    "dop sylvester": lambda: DOPMerge(solver="sylvester", others="average", alpha=None),
    "nufilt": lambda: NUFILTMerge(steps=3, lora_rank=2, task_rank=2),
    "nufilt null_space": lambda: NUFILTMerge("null_space", others="average"),
    "opcm": OPCMMerge,
    "opcm sum": lambda: OPCMMerge(alpha=0.3, recursion="sum"),
    "task_singular_vectors": TaskSingularVectorsMerge,
    "run": LargestOfRun,
    "sums": MeanNorm,
}


class Single(nn.Linear):
    """One parameter, so that some processes own none."""

    def __init__(self, seed, dtype):
        torch.manual_seed(seed)
        super().__init__(4, 5, bias=False, dtype=dtype)


class Longest(TorchDispatchMode):
    """The number of entries of the longest tensor of real numbers that was made."""

    length = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if type(leaf) is torch.Tensor and leaf.is_floating_point()]
        lengths = [leaf.numel() for leaf in tensors]
        self.length = max([self.length, *lengths])
        return result


def merge(directory, kind=Net, names=tuple(METHODS), dtype=torch.float32):
    """Merge four models by each method, going on from a saved state before the third."""
    processes = Processes.current()
    results = {}
    for name in names:
        net = kind(0, dtype)
        if processes.size > 1:
            fully_shard(net)
        stream, longest = Stream(METHODS[name](), base=take_snapshot(net)), 0
        for number, weight in enumerate(WEIGHTS, start=1):
            trace = TrainingTrace(collected={Snapshots: [take_snapshot(kind(10 + number, dtype))]})
            incoming = take_snapshot(kind(number, dtype))
            with Longest() as watch:
                stream.merge(net, incoming, f"task_{number}", weight, trace=trace)
            longest = max(longest, watch.length)
            state = stream.state.whole(net)
            if number == 2:
                path = Path(directory, f"{processes.size}-{name}")
                with processes.together():
                    if processes.rank == 0:
                        torch.save(state.state_dict(), path)
                stream = Stream(METHODS[name]())
                stream.state.load_state_dict(torch.load(path, weights_only=True, mmap=True))
                stream.state.cut(net)
                again = stream.state.whole(net)
                assert processes.rank or str(again.method) == str(state.method)  # not merged on yet
        results[name] = {"weights": whole(net), "method": state.method, "longest": longest}
    return results


def lose_one():
    """A rule that fails in one process, in which the others wait for its parameters."""
    net = Net(1)
    base = take_snapshot(net)
    fully_shard(net)

    class Failing(MeanNorm):
        by_tensor = True

        def start(self, incoming, context):
            if "embed.weight" in context.names:
                raise RuntimeError("no decomposition of embed.weight")
            return MergeResult(incoming)

    before = take_snapshot(net)
    try:
        Stream(Failing(), base=base).merge(net, base, "task")
    except RuntimeError as error:
        return str(error), all(torch.equal(before[name], tensor) for name, tensor in take_snapshot(net).items())
    return None


class Text(Need[str]):
    """A need that is no vector."""

    def build(self, sources):
        return sources.task


class Told(MeanNorm):
    needs = (Text(),)


def refusals():
    """Messages of what is refused: before a training, and at the merge."""
    net = Net(1)
    fully_shard(net)
    attempts = {
        "method": lambda: Stream("second_moment").check(net),
        "need": lambda: Stream(Told()).merge(net, take_snapshot(net), "task"),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def everything(directory):
    """All of the above in one job: a process takes long to start."""
    return {
        "fp32": merge(directory),
        "fp64": merge(directory, names=["closed_form", "sums"], dtype=torch.float64),
        "single": merge(directory, Single, ["closed_form", "task_singular_vectors", "sums"]),
        "refusals": refusals(),
        "failure": lose_one(),  # no sum is taken after it
    }

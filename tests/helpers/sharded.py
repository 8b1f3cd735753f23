"""What the processes of a job do in tests of evaluations and merges that they share."""

import time
from copy import deepcopy

import torch
import torch.distributed as dist
from job import Raised
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.flow import NonFiniteLossError, StepControl
from lightning_odem.methods import FunctionMerge, Minibatches, ODEMerge, PaperODEMerge, ReleasedODEMerge, ReplayMerge
from lightning_odem.methods.needs import Calibration
from lightning_odem.parameters.processes import Processes
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.stream.merging import merging

SIZES = {"old": 13, "new": 8}
METHODS = {
    "ode": ODEMerge(batch_size=5),
    "ode_paper search": PaperODEMerge(0.25, minibatches=Minibatches(5), operating_time="search"),
    "ode_paper became": PaperODEMerge(0.25, operating_time="became", step_control=StepControl()),
    "ode_paper": PaperODEMerge(),
    "ode_paper heun": PaperODEMerge(solver="heun"),
    "ode_paper tensor": PaperODEMerge(granularity="tensor"),
    "ode_paper row": PaperODEMerge(granularity="row"),
    "ode_paper coordinate": PaperODEMerge(granularity="coordinate"),
    "ode_released": ReleasedODEMerge(0.25),
    "replay": ReplayMerge(lr=0.01, batch_size=6),
}


class Rare(Exception):
    """An error with a constructor of its own."""

    def __init__(self, where, depth):
        super().__init__(f"{where} at {depth}")
        self.where = where


def make_net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def make_calibration(net, sizes, dtype=torch.float64, batch_size=4):
    """Cross entropy on tasks of random samples."""
    generator = torch.Generator().manual_seed(1)
    buffer = CalibrationBuffer(100, shares="utility")
    for number, (task, size) in enumerate(sizes.items(), start=1):
        inputs = torch.randn(size, 3, generator=generator, dtype=torch.float64).to(dtype)
        buffer.add(task, (inputs, torch.arange(size) % 4), weight=float(number))
    return CalibrationSet(buffer, lambda batch: cross_entropy(net(batch.samples[0]), batch.samples[1]), batch_size)


def evaluate(cases):
    """Loss, gradient, losses of micro-batches, counts and all-reduces of each (sizes, dtype) in turn."""
    calls = _count_all_reduces()
    results = []
    for sizes, dtype in cases:
        net = make_net(dtype=dtype)
        objective = make_calibration(net, sizes, dtype).objective(ParameterVector(net))
        theta = objective.vector.read()
        calls.clear()
        loss, grad = objective.loss_and_grad(theta)
        after_gradient = len(calls)
        results.append(
            {
                "loss": loss,
                "grad": grad.clone(),
                "loss without gradient": objective.loss(theta),
                "losses": objective.losses(theta, objective.micro_batches()),
                "samples": objective.sample_gradients,
                "all-reduces": (after_gradient, len(calls)),
            }
        )
    return results


def merge(dtype):
    """The merged weights, some losses, evaluations and all-reduces of each method."""
    calls = _count_all_reduces()
    results = {}
    for name, kind in METHODS.items():
        net, method = make_net(1, dtype), deepcopy(kind)  # which may keep a state
        merged = take_snapshot(make_net(0, dtype))
        calibration = make_calibration(net, SIZES, dtype)
        base = take_snapshot(make_net(2, dtype))
        calls.clear()
        with merging(net, method, task="new", t=0.4, merged=merged, base=base, calibration=calibration) as made:
            record = made.record
            evaluations = record.gradient_evaluations + record.loss_evaluations
        weights = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
        losses = [record.loss_before, record.loss_after, record.barrier]
        results[name] = weights, losses, evaluations, len(calls)
    return results


def fail_in_the_loss(kind):
    """An error in one process's part of a gradient or of losses; the next evaluation is that of all again."""
    rank = Processes.current().rank
    net = make_net()
    calibration = make_calibration(net, SIZES)
    objective = calibration.objective(ParameterVector(net))
    batch_loss, theta = objective.batch_loss, objective.vector.read()
    expected = objective.loss(theta)

    def failing(batch):
        if rank == 1:
            raise Rare("in the loss", 7)
        return batch_loss(batch)

    objective.batch_loss = failing
    try:
        getattr(objective, kind)(theta)
    except Exception as error:
        objective.batch_loss = batch_loss
        return Raised.of(error), objective.loss(theta) == expected
    return None


def differentiate_what_few_reach():
    """A loss that has a gradient in one process alone, and one that has it in none."""
    processes, net = Processes.current(), make_net()
    calibration = make_calibration(net, SIZES)
    objective = calibration.objective(ParameterVector(net))
    theta, batch_loss = objective.vector.read(), objective.batch_loss
    objective.batch_loss = lambda batch: batch_loss(batch) if processes.rank == 1 else batch_loss(batch).detach()
    assert objective.loss_and_grad(theta)[1].any()
    objective.batch_loss = lambda batch: batch_loss(batch).detach()
    objective.loss_and_grad(theta)


def scale_losses():
    """A scale too large for one process's samples; the one that is left, passes, and the gradient's error."""
    net = make_net(dtype=torch.float32)
    calibration = make_calibration(net, SIZES, torch.float32)

    def batch_loss(batch):
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(net(batch.samples[0]).float(), batch.samples[1])
        return loss * 64.0

    objective = CalibrationSet(calibration.buffer, batch_loss, 4, loss_scale=2.0**16).objective(ParameterVector(net))
    theta = objective.vector.read()
    _, grad = objective.loss_and_grad(theta)
    _, expected = make_calibration(net, SIZES, torch.float32).objective(objective.vector).loss_and_grad(theta)
    error = (grad / 64.0 - expected).norm() / expected.norm()
    return objective.loss_scale.value, objective.gradient_evaluations, error.item()


def merge_and_fail(where):
    """A merge that fails in one process; whether its module is as it was, and what the merge raised."""
    rank = Processes.current().rank
    net = make_net(1)
    before = take_snapshot(net)
    calibration = make_calibration(net, SIZES)
    batch_loss = calibration.batch_loss
    evaluations = 0

    def failing_loss(batch):
        nonlocal evaluations
        evaluations += 1
        if where == "loss" and rank == 1 and evaluations == 5:
            raise NonFiniteLossError("a weight is nan", 3, 0.2)
        return batch_loss(batch)

    def on_step(done, total):
        if where == "step" and rank == 0 and done == 2:
            raise OSError(28, "No space left on device")

    def rule(merged, incoming, t, context):
        if where == "method" and rank == 1:
            raise Rare("before the first evaluation", 0)
        return PaperODEMerge().merge(merged, incoming, t, context).theta

    rule.needs = (Calibration(),)
    started = time.monotonic()
    try:
        with merging(
            net,
            FunctionMerge(rule),
            task="new",
            t=0.4,
            merged=take_snapshot(make_net(0)),
            base={},
            calibration=CalibrationSet(calibration.buffer, failing_loss, 4),
            on_step=on_step,
        ):
            if where == "after" and rank == 1:
                raise KeyError("accuracy")
    except Exception as error:
        after = take_snapshot(net)
        same = all(torch.equal(before[name], after[name]) for name in before)
        return Raised.of(error), same, time.monotonic() - started
    return None


def blocks():
    """Blocks of several processes, one after the other: what each raised."""
    processes, raised = Processes.current(), []

    class Local(Exception):
        """Not to be found by name."""

    def block(action):
        try:
            with processes.together(), processes.together():
                action()
        except BaseException as error:
            raised.append(Raised.of(error))
        else:
            raised.append(None)

    def on(rank, error):
        def fail():
            if processes.rank == rank:
                raise error

        return fail

    block(lambda: None)
    block(on(1, Rare("here", 1)))
    block(on(0, Local("lost")))
    block(on(1, KeyboardInterrupt()))
    block(lambda: on(processes.rank, ValueError(f"of process {processes.rank}"))())
    block(lambda: None)
    raised.append(processes.sum_(torch.tensor([1.0 + processes.rank])).item())
    raised.append(processes.broadcast_(torch.tensor([5.0 + processes.rank])).item())
    return raised


def fail_before_others_enter(rank, wait_for_tensor):
    """An error outside of the inner block that the others are in, and another block afterwards."""
    processes = Processes.current()
    try:
        with processes.together():
            if processes.rank == rank:
                raise Rare("outside", 2)
            with processes.together():
                if wait_for_tensor:
                    processes.sum_(torch.zeros(2))
    finally:
        with processes.together():
            pass


def _count_all_reduces():
    calls, all_reduce = [], dist.all_reduce

    def counted(*arguments, **settings):
        calls.append(1)
        return all_reduce(*arguments, **settings)

    dist.all_reduce = counted
    return calls

import math

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import nn
from torch.nn.functional import mse_loss

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.calibration.buffer import MicroBatch
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods import MergeContext
from lightning_odem.methods.needs import Calibration
from lightning_odem.methods.ode_released import ReleasedODEMerge
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.merging import merging

FP64 = torch.float64
D = 6


class QuadraticTasks:
    """The interface of a calibration objective on batches of closed form, (theta - c)' A (theta - c) / 2."""

    def __init__(self, tasks, shares=None):
        shares = shares or [1 / len(tasks)] * len(tasks)
        self.tasks, self.shares = tasks, dict(zip(tasks, shares, strict=True))
        self.gradient_evaluations = self.loss_evaluations = self.batch_gradients = 0

    def micro_batches(self):
        return [
            MicroBatch(piece, task, self.shares[task] / len(pieces), False)
            for task, pieces in self.tasks.items()
            for piece in pieces
        ]

    def losses(self, theta, batches):
        self.loss_evaluations += 1
        return [
            float(0.5 * (theta - centre) @ matrix @ (theta - centre))
            for matrix, centre in (batch.samples for batch in batches)
        ]

    def loss_and_grad(self, theta, batches):
        self.gradient_evaluations += 1
        self.batch_gradients += len(batches)
        gradients = [
            batch.share * (matrix @ (theta - centre))
            for batch, (matrix, centre) in ((batch, batch.samples) for batch in batches)
        ]
        return math.nan, torch.stack(gradients).sum(0)


def random_tasks(seed, counts, curvature=0.3):
    """Batches around a minimum of each task; curvatures of both signs, so that losses rise above their chords."""
    generator = torch.Generator().manual_seed(seed)

    def piece(centre):
        root = torch.randn(D, D, generator=generator, dtype=FP64)
        matrix = root @ root.T / D - curvature * torch.eye(D, dtype=FP64)
        return matrix, centre + 0.2 * torch.randn(D, generator=generator, dtype=FP64)

    centres = torch.randn(len(counts), D, generator=generator, dtype=FP64)
    return {
        f"task{index}": [piece(centre) for _ in range(count)]
        for index, (count, centre) in enumerate(zip(counts, centres, strict=True))
    }


def models(seed=0, dtype=FP64):
    return torch.randn(2, D, generator=torch.Generator().manual_seed(100 + seed), dtype=FP64).to(dtype).unbind()


def context(objective, **settings):
    return MergeContext(["a"], [(D,)], needed={Calibration: objective}, **settings)


def task_losses(tasks, theta):
    return np.array(
        [
            np.mean([0.5 * (theta - c) @ a @ (theta - c) for a, c in ((a.numpy(), c.numpy()) for a, c in pieces[:8])])
            for pieces in tasks.values()
        ]
    )


def nearest(start, gradients, bounds):
    """Least distance programming by non-negative least squares (Lawson & Hanson, 1974, chapter 23)."""
    g, h = -np.array(gradients), np.array(gradients) @ start - np.array(bounds)
    stacked, target = np.vstack([g.T, h]), np.append(np.zeros(len(start)), 1.0)
    residual = stacked @ nnls(stacked, target)[0] - target
    # A vanishing residual means that nothing is feasible.
    return start - residual[:-1] / residual[-1] if np.abs(residual).max() > 1e-10 else start


def largest(values, scale):
    """Indices of the two largest; of those that differ by rounding the first."""
    return sorted(range(len(values)), key=lambda index: -round(float(values[index]) / scale, 9))[:2]


def written_out(tasks, shares, theta0, theta1, t_end, h, budget=0.08, descent=0.24, power=0.25):
    """The released step in numpy, every quantity computed where it is used."""
    theta0, theta1 = theta0.numpy(), theta1.numpy()
    names = list(tasks)
    first, last = task_losses(tasks, theta0), task_losses(tasks, theta1)
    theta, path = theta0, {"t": [0.0], "loss": [shares @ first], "alignment": [], "step_norm": []}
    scales, corrections = [], []

    def ceilings(t):
        return (1 - t) * first + t * last + budget * (1 - t) ** 2

    def gradient(name, point, pieces):
        return sum(a.numpy() @ (point - c.numpy()) for a, c in tasks[name][:pieces])

    times = [h * step for step in range(math.ceil(round(t_end / h, 9)))] + [t_end]
    for t, end in zip(times[:-1], times[1:], strict=True):
        u = (theta1 - theta) / (1 - t)
        losses = task_losses(tasks, theta)
        size = max(np.abs(losses).max(), np.abs(ceilings(t)).max())
        excess = largest(losses - ceilings(t), size)
        rises = np.array([gradient(name, theta, 1) @ u for name in names])
        sensitive = [index for index in largest(rises, np.abs(rises).max()) if rises[index] > 0]
        constrained = sorted({*excess, *sensitive})
        macro = np.zeros(D)
        for name, share in zip(names, shares, strict=True):
            total = gradient(name, theta, 8)
            macro += share * total / np.linalg.norm(total) ** power
        w = u - descent * np.linalg.norm(u) / np.linalg.norm(macro) * macro
        bounds = [min((ceilings(end)[index] - losses[index]) / (end - t), 0.0) for index in constrained]
        v = nearest(w, [gradient(names[index], theta, 1) for index in constrained], bounds)
        scale = next(
            (
                s
                for s in 0.7 ** np.arange(8)
                if (task_losses(tasks, theta + (end - t) * s * v) <= ceilings(end) + 1e-9 * size).all()
            ),
            0.0,
        )
        theta = theta + (end - t) * scale * v
        path["t"].append(end)
        path["loss"].append(shares @ task_losses(tasks, theta))
        path["alignment"].append(macro @ u)
        path["step_norm"].append((end - t) * scale * np.linalg.norm(v))
        scales.append(scale)
        corrections.append(np.linalg.norm(v - w))
    return theta, path, np.array(scales), np.array(corrections)


CASES = [
    # seed, batches of each task, curvature, shares, t, settings
    (0, [1, 3], 0.3, [0.5, 0.5], 0.5, {}),
    (1, [2, 1, 4], 0.3, [0.2, 0.5, 0.3], 1 / 3, {"step_size": 0.05}),
    (2, [10, 1, 2, 3, 1], 0.3, [0.2] * 5, 0.37, {"step_size": 0.1, "descent": 0.0}),
    (3, [1] * 6, 0.3, [1 / 6] * 6, 0.9, {"step_size": 0.07, "budget": 0.0}),
    (4, [9, 8], 0.3, [0.7, 0.3], 0.25, {"step_size": 0.02, "norm_power": 1.0, "descent": 1.0}),
    (5, [2, 2, 2], 0.3, [1 / 3] * 3, 0.6, {"step_size": 1.0, "norm_power": 0.0, "budget": 2.0}),
    (2, [2, 2], 0.8, [0.5, 0.5], 0.5, {"step_size": 0.02, "budget": 0.05}),
]


def reference(seed, counts, curvature, shares, t, settings):
    names = {"step_size": "h", "norm_power": "power"}
    arguments = {"h": 0.01} | {names.get(name, name): value for name, value in settings.items()}
    return written_out(random_tasks(seed, counts, curvature), np.array(shares), *models(seed), t, **arguments)


@pytest.mark.parametrize(("seed", "counts", "curvature", "shares", "t", "settings"), CASES)
def test_the_merge_is_the_released_step_written_out(seed, counts, curvature, shares, t, settings):
    expected, path, _, _ = reference(seed, counts, curvature, shares, t, settings)
    objective = QuadraticTasks(random_tasks(seed, counts, curvature), shares)
    merged, incoming = models(seed)
    result = ReleasedODEMerge(**settings).merge(merged.clone(), incoming, t, context(objective))
    torch.testing.assert_close(result.theta, torch.from_numpy(expected), rtol=1e-6, atol=1e-6)
    for name, values in path.items():
        assert getattr(result.trajectory, name) == pytest.approx(values, rel=1e-5, abs=1e-6), name
    assert result.trajectory.loss1 == pytest.approx(np.array(shares) @ task_losses(objective.tasks, incoming.numpy()))
    assert torch.equal(incoming, models(seed)[1])


class Shifted(QuadraticTasks):
    """Losses with a constant added to each, which no gradient and no rule knows of."""

    def __init__(self, tasks, constants):
        super().__init__(tasks)
        self.constants = dict(zip(tasks, constants, strict=True))

    def losses(self, theta, batches):
        return [
            loss + self.constants[batch.task]
            for loss, batch in zip(super().losses(theta, batches), batches, strict=True)
        ]


def test_rounding_does_not_decide_which_tasks_are_constrained():
    """At the start of a path all tasks are equally far below their ceilings, whatever their losses are."""
    method, (merged, incoming) = ReleasedODEMerge(step_size=1.0, norm_power=0.0, budget=2.0), models(5)

    def merge(constants):
        objective = Shifted(random_tasks(5, [2, 2, 2]), constants)
        return method.merge(merged.clone(), incoming, 0.6, context(objective)).theta

    for constants in np.random.default_rng(0).random((20, 3)):
        torch.testing.assert_close(merge(constants), merge([0.0] * 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("constant", "step_size"), [(1.1, 0.05), (2.1, 0.07), (0.29, 0.02)])
def test_a_loss_that_stays_is_not_above_a_ceiling_that_stays(constant, step_size):
    (merged, incoming), tasks = models(), falling_tasks()
    tasks["flat"] = [(torch.zeros(D, D, dtype=FP64), merged)]
    objective, method = Shifted(tasks, [0.0, 0.0, constant]), ReleasedODEMerge(step_size, budget=0.0, descent=0.0)
    result = method.merge(merged.clone(), incoming, 0.75, context(objective))
    torch.testing.assert_close(result.theta, torch.lerp(merged, incoming, 0.75), rtol=1e-10, atol=1e-12)


def test_the_cases_written_out_know_full_steps_shorter_ones_none_and_projections():
    results = [reference(*case) for case in CASES]
    scales, corrections = (np.concatenate(values) for values in list(zip(*results, strict=True))[2:])
    assert {0.0, 1.0} < set(scales.tolist())
    assert ((scales > 0) & (scales < 1)).sum() > 2
    assert (corrections > 0.1).any()
    assert (corrections < 1e-9).any()


def falling_tasks():
    """Two tasks whose loss falls on the straight line between the models and beyond."""
    merged, incoming = models()
    return {
        f"task{factor}": [(torch.eye(D, dtype=FP64), merged + factor * (incoming - merged))]
        for factor in (3, 5)
        for index, factor in enumerate((3, 5))
    }


@pytest.mark.parametrize("t", [0.1, 1 / 3, 0.995])
def test_without_descent_and_active_constraints_it_is_the_running_average(t):
    (merged, incoming), objective = models(), QuadraticTasks(falling_tasks())
    result = ReleasedODEMerge(budget=1e6, descent=0.0).merge(merged.clone(), incoming, t, context(objective))
    torch.testing.assert_close(result.theta, torch.lerp(merged, incoming, t), rtol=1e-10, atol=1e-12)
    assert result.trajectory.t[-1] == t
    length = float((incoming - merged).norm())
    assert sum(result.trajectory.step_norm) == pytest.approx(t * length)


@pytest.mark.parametrize("dtype", [torch.float32, FP64])
@pytest.mark.parametrize("refine", [False, True])
def test_time_0_leaves_the_merged_model_and_time_1_gives_the_incoming_one_bit_by_bit(dtype, refine):
    for t in (0, 1):
        vectors = models(dtype=dtype)
        tasks = {"a": [(torch.eye(D, dtype=dtype), torch.ones(D, dtype=dtype))]}
        result = ReleasedODEMerge(refine=refine).merge(
            vectors[0].clone(), vectors[1], float(t), context(QuadraticTasks(tasks))
        )
        assert torch.equal(result.theta, vectors[t])


@pytest.mark.parametrize("seed", [3, 4, 9])
def test_no_task_rises_above_its_ceiling_where_the_average_does(seed):
    tasks, (merged, incoming) = random_tasks(seed, [2, 2], curvature=0.8), models(seed)
    first, last = task_losses(tasks, merged.numpy()), task_losses(tasks, incoming.numpy())
    times = np.append(np.arange(0, 0.49, 0.02), 0.49)

    def above(points):
        ceilings = [(1 - t) * first + t * last + 0.05 * (1 - t) ** 2 for t in times]
        return np.array([task_losses(tasks, point) for point in points]) - ceilings

    points, theta = [], merged.clone()
    watching = context(QuadraticTasks(tasks), on_step=lambda *_: points.append(theta.clone().numpy()))
    result = ReleasedODEMerge(0.02, budget=0.05).merge(theta, incoming, 0.49, watching)
    assert above([torch.lerp(merged, incoming, float(t)).numpy() for t in times]).max() > 0.1
    assert above(points).max() <= 1e-12
    assert result.trajectory.t == pytest.approx(times)
    assert min(result.trajectory.step_norm) > 0.0


def test_it_stays_where_no_step_is_allowed():
    class Walled(QuadraticTasks):
        def losses(self, theta, batches):
            losses = super().losses(theta, batches)
            return losses if any(torch.equal(theta, model) for model in models()) else [math.inf] * len(losses)

    (merged, incoming), objective = models(), Walled(random_tasks(0, [1, 1]))
    result = ReleasedODEMerge(0.1).merge(merged.clone(), incoming, 0.5, context(objective))
    assert torch.equal(result.theta, merged)
    assert result.trajectory.step_norm == [0.0] * 5
    assert objective.loss_evaluations == 2 + 5 * 8


def test_a_step_takes_one_gradient_of_each_of_the_first_eight_batches():
    objective = QuadraticTasks(random_tasks(0, [1, 3, 10]))
    result = ReleasedODEMerge(0.1, budget=1e6).merge(*models(), 0.45, context(objective))
    assert objective.batch_gradients == 5 * (1 + 3 + 8)
    # The first batch by itself, and the others where there are any.
    assert objective.gradient_evaluations == result.trajectory.gradient_evaluations == 5 * (1 + 2 + 2)
    # One try per step, and both models.
    assert objective.loss_evaluations == 5 + 2


def test_it_tells_how_far_it_is():
    steps = []
    watching = context(QuadraticTasks(falling_tasks()), on_step=lambda *step: steps.append(step))
    ReleasedODEMerge(0.25).merge(*models(), 0.6, watching)
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_path_without_damping_has_no_gamma():
    path = ReleasedODEMerge(0.1).merge(*models(), 0.3, context(QuadraticTasks(falling_tasks()))).trajectory
    assert {name: len(values) for name, values in path.as_dict().items()} == {
        "t": 4, "loss": 4, "alignment": 3, "gamma": 0, "alignment_ratio": 0, "step_norm": 3, "damped_share": 0
    }  # fmt: skip


def test_a_loss_that_is_not_finite_is_reported_with_its_task():
    tasks = random_tasks(0, [1, 1])
    tasks["task1"] = [(tasks["task1"][0][0] * math.nan, tasks["task1"][0][1])]
    with pytest.raises(NonFiniteLossError, match=r"the merged model's loss on task 'task1' is nan at step 0"):
        ReleasedODEMerge().merge(*models(), 0.5, context(QuadraticTasks(tasks)))


def test_a_gradient_that_is_not_finite_is_reported_with_its_step():
    class Broken(QuadraticTasks):
        def loss_and_grad(self, theta, batches):
            loss, gradient = super().loss_and_grad(theta, batches)
            return loss, gradient * (math.inf if self.gradient_evaluations > 2 else 1.0)

    with pytest.raises(NonFiniteLossError, match=r"so a gradient or a weight, is nan at step 1 \(t = 0.1\)"):
        ReleasedODEMerge(0.1).merge(*models(), 0.5, context(Broken(falling_tasks())))


@pytest.mark.parametrize(
    "settings", [{"step_size": 0.0}, {"step_size": 1.5}, {"budget": -1.0}, {"descent": -0.1}, {"norm_power": 1.1}]
)
def test_unusable_settings_are_refused(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name} must lie in .* got {name}={value}"):
        ReleasedODEMerge(**settings)


class TestModule:
    """The method on a real module, through the merge transaction."""

    def net(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def calibration(self, net):
        generator, buffer = torch.Generator().manual_seed(9), CalibrationBuffer(100)
        for scale, (task, size) in enumerate({"old": 20, "new": 8}.items(), start=1):
            inputs = torch.randn(size, 3, generator=generator)
            buffer.add(task, (inputs, scale * inputs.sum(1, keepdim=True)))
        return CalibrationSet(buffer, lambda batch: mse_loss(net(batch.samples[0]), batch.samples[1]), batch_size=5)

    def merge(self, method, t=0.23):
        net, merged = self.net(1), take_snapshot(self.net(0))
        calibration = self.calibration(net)
        with merging(net, method, task="new", t=t, merged=merged, base={}, calibration=calibration) as made:
            pass
        return net, calibration, made.record

    def test_the_record_tells_what_was_done(self):
        net, calibration, record = self.merge(ReleasedODEMerge(0.1))
        assert record.path["t"] == pytest.approx([0.0, 0.1, 0.2, 0.23])
        assert record.steps == 3
        assert record.gradient_evaluations == 3 * 2 * 2
        assert record.sample_gradients == 3 * 28
        assert record.loss_evaluations >= 3 + 2
        with torch.no_grad():
            pieces = [
                [calibration.batch_loss(batch) for batch in calibration.buffer.micro_batches(5) if batch.task == task]
                for task in ("old", "new")
            ]
        assert record.loss_after == pytest.approx(sum(float(torch.stack(losses).mean()) for losses in pieces) / 2)
        assert record.loss_after < record.path["loss"][0]
        assert 0 < record.gradient_seconds < record.merge_seconds

    def test_the_same_merge_gives_the_same_bits(self):
        first, second = (self.merge(ReleasedODEMerge(0.1, refine=True))[0].state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_refinement_goes_on_from_the_end_of_the_path(self):
        plain, _, before = self.merge(ReleasedODEMerge(0.1))
        refined, _, after = self.merge(ReleasedODEMerge(0.1, refine=True))
        assert after.path["loss"][:-1] == before.path["loss"][:-1]
        assert after.loss_after < before.loss_after
        start, end = (nn.utils.parameters_to_vector(net.parameters()).detach() for net in (plain, refined))
        assert 0 < float((end - start).norm()) <= 1e-3 * float(start.norm()) * (1 + 1e-5)

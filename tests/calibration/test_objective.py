import time

import pytest
import sharded
import torch
from job import run_job
from reads import Reads
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective
from lightning_odem.calibration.objective import Counted
from lightning_odem.calibration.scaling import LossScale
from lightning_odem.parameters.vector import ParameterVector

BF16, FP64 = torch.bfloat16, torch.float64
SIZES = {"a": 7, "b": 3, "c": 5}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


def make_net(dtype=FP64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def task_data(dtype=FP64):
    generator = torch.Generator().manual_seed(1)
    return {
        task: (torch.randn(size, 3, generator=generator).to(dtype), torch.arange(size) % 4)
        for task, size in SIZES.items()
    }


def make_objective(net, quota="equal", batch_size=128, exclude=(), dtype=FP64, shares="quota"):
    buffer = CalibrationBuffer(100, quota, shares=shares)
    for task, samples in task_data(dtype).items():
        buffer.add(task, samples, weight=WEIGHTS[task])

    def batch_loss(batch):
        return cross_entropy(net(batch.samples[0]), batch.samples[1])

    return CalibrationObjective(ParameterVector(net, exclude), buffer, batch_loss, batch_size)


def written_out(net, shares, dtype=FP64):
    """Loss and gradient from one graph over all samples."""
    losses = {task: cross_entropy(net(inputs), labels) for task, (inputs, labels) in task_data(dtype).items()}
    loss = sum(shares[task] * losses[task] for task in SIZES)
    return loss.item(), torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(net.parameters()))])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("quota", "rule", "shares"),
    [
        ("equal", "quota", dict.fromkeys(SIZES, 1 / 3)),
        ("utility", "quota", {"a": 1 / 3.5, "b": 2 / 3.5, "c": 0.5 / 3.5}),
        ("equal", "utility", {"a": 1 / 3.5, "b": 2 / 3.5, "c": 0.5 / 3.5}),
        ("utility", "equal", dict.fromkeys(SIZES, 1 / 3)),
    ],
)
def test_loss_and_gradient_are_those_of_the_weighted_sum_over_tasks(batch_size, quota, rule, shares):
    net, reference = make_net(), make_net()
    objective = make_objective(net, quota, batch_size, shares=rule)
    theta = torch.randn(len(objective.vector), dtype=FP64, generator=torch.Generator().manual_seed(3))
    ParameterVector(reference).write_(theta)
    expected_loss, expected = written_out(reference, shares)
    loss, gradient = objective.loss_and_grad(theta)
    assert gradient.dtype == FP64
    assert loss == pytest.approx(expected_loss, rel=1e-13)
    assert objective.loss(theta) == pytest.approx(expected_loss, rel=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_a_bf16_module_gives_an_fp32_gradient_of_the_rounded_point():
    net, reference = make_net(BF16), make_net(FP64)
    objective = make_objective(net, batch_size=2, dtype=BF16)
    theta = torch.randn(len(objective.vector), generator=torch.Generator().manual_seed(3))
    ParameterVector(reference).write_(theta.to(BF16).double())
    loss, gradient = objective.loss_and_grad(theta)
    expected_loss, expected = written_out(reference, dict.fromkeys(SIZES, 1 / 3))
    assert gradient.dtype == torch.float32
    assert loss == pytest.approx(expected_loss, rel=0.02)
    assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_the_module_is_left_at_the_point_evaluated_last():
    objective = make_objective(make_net())
    theta = torch.full((len(objective.vector),), 0.25, dtype=FP64)
    objective.loss_and_grad(theta + 1)
    objective.loss(theta)
    assert torch.equal(objective.vector.read(), theta)


def test_every_gradient_is_a_new_vector():
    objective = make_objective(make_net())
    theta = objective.vector.read()
    _, first = objective.loss_and_grad(theta)
    kept = first.clone()
    _, second = objective.loss_and_grad(theta + 1)
    assert torch.equal(first, kept)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("exclude", [(), ("2",)])
def test_no_gradient_is_left_on_the_module(exclude):
    net = make_net()
    objective = make_objective(net, exclude=exclude)
    objective.loss_and_grad(objective.vector.read())
    objective.loss(objective.vector.read())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_gradient_can_be_had_under_no_grad():
    objective = make_objective(make_net())
    with torch.no_grad():
        _, gradient = objective.loss_and_grad(objective.vector.read())
    assert gradient.any()


def test_passes_and_their_time_are_counted():
    objective = make_objective(make_net())
    batch_loss, theta = objective.batch_loss, objective.vector.read()

    def slow(batch):
        time.sleep(0.01)
        return batch_loss(batch)

    objective.batch_loss = slow
    started = time.perf_counter()
    objective.loss_and_grad(theta)
    objective.loss_and_grad(theta)
    objective.loss(theta)
    elapsed = time.perf_counter() - started
    assert (objective.gradient_evaluations, objective.loss_evaluations) == (2, 1)
    assert 3 * len(SIZES) * 0.01 <= objective.seconds <= elapsed


@pytest.mark.parametrize("detach", [False, True])
def test_a_loss_without_gradient_is_an_error(detach):
    objective = make_objective(make_net())
    other = nn.Linear(3, 4).double()

    def unrelated(batch):
        loss = other(batch.samples[0]).sum()
        return loss.detach() if detach else loss

    objective.batch_loss = unrelated
    with pytest.raises(ValueError, match="The calibration loss has no gradient: backward reached none of 4"):
        objective.loss_and_grad(objective.vector.read())


def test_a_task_whose_loss_is_constant_adds_no_gradient():
    net = make_net()
    objective = make_objective(net)
    batch_loss, theta = objective.batch_loss, objective.vector.read()
    objective.batch_loss = lambda batch: torch.tensor(6.0) if batch.task == "b" else batch_loss(batch)
    expected_loss, expected = written_out(net, {"a": 1 / 3, "b": 0.0, "c": 1 / 3})
    loss, gradient = objective.loss_and_grad(theta)
    assert loss == pytest.approx(expected_loss + 2.0)
    torch.testing.assert_close(gradient, expected)


EVALUATIONS = [
    ({"a": 12}, torch.float64),  # even
    ({"a": 7, "b": 3, "c": 5}, torch.float64),
    ({"a": 7, "b": 3, "c": 6}, torch.float32),
    ({"a": 2}, torch.float64),  # fewer than processes
    ({"a": 1}, torch.float32),
]


def relative(found, expected):
    return ((torch.as_tensor(found) - torch.as_tensor(expected)).norm() / torch.as_tensor(expected).norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_every_evaluation_in_one_all_reduce(size):
    alone = sharded.evaluate(EVALUATIONS)
    first, *others = run_job(sharded.evaluate, size, EVALUATIONS)
    for (_, dtype), expected, found in zip(EVALUATIONS, alone, first, strict=True):
        bound = 1e-13 if dtype == FP64 else 1e-6
        for what in ("loss", "grad", "loss without gradient", "losses"):
            assert relative(found[what], expected[what]) <= (bound if size > 1 else 0.0)
        assert found["samples"] == expected["samples"]
        assert found["all-reduces"] == ((1, 3) if size > 1 else (0, 0))
    for other in others:
        for own, same in zip(first, other, strict=True):
            assert torch.equal(own["grad"], same["grad"])
            assert own | {"grad": None} == same | {"grad": None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "loss_and_grad"])
def test_an_error_in_the_part_of_one_process_is_raised_in_all_and_the_next_evaluation_goes_well(kind):
    results = run_job(sharded.fail_in_the_loss, 3, kind)
    assert [(error.kind, error.message, well) for error, well in results] == [("Rare", "in the loss at 7", True)] * 3
    assert ["process 1 of 3" in error.cause for error, _ in results] == [True, False, True]


@pytest.mark.slow
def test_a_gradient_that_one_process_alone_has_is_enough_and_one_that_none_has_is_an_error_in_all():
    results = run_job(sharded.differentiate_what_few_reach, 2)
    assert {error.kind for error in results} == {"NoGradientError"}
    assert all("backward reached none of 4" in error.message for error in results)


@pytest.mark.slow
def test_the_scale_of_the_loss_is_lowered_in_all_processes_together():
    first, second = run_job(sharded.scale_losses, 2)
    assert first == second
    scale, evaluations, relative_error = first
    assert 1.0 < scale < 2.0**16
    assert evaluations > 1
    assert relative_error < 2e-3


def masked(task):
    """Which samples count, and how much."""
    return torch.arange(SIZES[task]) % 3


def make_counted(net, batch_size):
    buffer = CalibrationBuffer(100)
    for task, (inputs, labels) in task_data().items():
        buffer.add(task, (inputs, labels, masked(task)))

    def batch_loss(batch):
        inputs, labels, mask = batch.samples
        losses = cross_entropy(net(inputs), labels, reduction="none")
        return Counted((losses * mask).sum() / mask.sum(), float(mask.sum()))  # NaN where nothing counts

    return CalibrationObjective(ParameterVector(net), buffer, batch_loss, batch_size)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_a_micro_batch_counts_by_what_its_loss_is_a_mean_over(batch_size):
    net = make_net()
    objective = make_counted(net, batch_size)
    theta = torch.randn(len(objective.vector), dtype=FP64, generator=torch.Generator().manual_seed(3))
    loss, gradient = objective.loss_and_grad(theta)
    losses = []
    for task, (inputs, labels) in task_data().items():
        mask = masked(task)
        losses.append((cross_entropy(net(inputs), labels, reduction="none") * mask).sum() / mask.sum())
    expected = sum(losses) / 3
    grads = torch.autograd.grad(expected, list(net.parameters()))
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.cat([grad.flatten() for grad in grads]), rtol=1e-11, atol=1e-15)


def test_random_minibatches_are_unbiased_where_samples_count_differently():
    objective = make_counted(make_net(), 100)
    theta = objective.vector.read()
    expected = objective.loss(theta)
    epoch = list(objective.buffer.minibatches(2, torch.Generator().manual_seed(0)))
    found = [
        objective.loss(theta, minibatch) * sum(len(batch.samples[0]) for batch in minibatch) for minibatch in epoch
    ]
    assert sum(found) / len(objective.buffer) == pytest.approx(expected, rel=1e-12)


def test_a_minibatch_without_any_target_has_no_loss_and_no_gradient():
    objective = make_counted(make_net(), 100)
    (batch,) = objective.buffer.micro_batches_of("a", 100)
    empty = batch.select((batch.samples[2] == 0).nonzero().flatten())
    loss, gradient = objective.loss_and_grad(objective.vector.read(), [empty])
    assert loss == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_step_may_take_gradients_and_reset_them_on_the_way_to_its_loss(set_to_none):
    """As adversarial training does."""
    plain, adversarial = (make_objective(make_net(), batch_size=2) for _ in range(2))
    net, step = adversarial.vector._module, adversarial.batch_loss

    def batch_loss(batch):
        if torch.is_grad_enabled():
            step(batch).backward()
            net.zero_grad(set_to_none)
        return step(batch)

    adversarial.batch_loss = batch_loss
    theta = plain.vector.read()
    assert torch.equal(adversarial.loss_and_grad(theta)[1], plain.loss_and_grad(theta)[1])


@pytest.mark.parametrize("batch_size", [1, 100])
def test_a_pass_reads_the_losses_of_all_micro_batches_at_once(batch_size):
    objective = make_objective(make_net(), batch_size=batch_size)
    theta = objective.vector.read()
    for evaluate in (objective.loss, objective.loss_and_grad):
        with Reads() as reads:
            evaluate(theta)
        assert reads.number == 1


def test_a_pass_with_gradient_reads_nothing_before_the_loss_is_asked_for():
    objective = make_objective(make_net(), batch_size=2)
    objective.loss_scale = LossScale(2.0**16)
    theta = objective.vector.read()
    with Reads() as reads:
        loss, grad = objective.differentiate(theta)
        assert reads.number == 0
        value = loss.result()
    assert reads.number == 1
    expected = objective.loss_and_grad(theta)
    assert value == expected[0]
    assert torch.equal(grad, expected[1])

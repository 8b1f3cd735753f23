import lightning as L
import pytest
import torch
from job import run_job
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective, MicroBatch
from lightning_odem.calibration.joint import JointSamples, join, trials
from lightning_odem.calibration.loss import ModuleLoss
from lightning_odem.parameters import OwnParameters, ParameterVector

FP64 = torch.float64
TASKS = [f"task {number}" for number in range(6)]


def samples(number, size=4):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 3, generator=generator, dtype=FP64), (torch.arange(size) + number) % 5


def batches_of(sizes, share=None, **kwargs):
    return [
        MicroBatch(samples(number, size), TASKS[number], share or size / sum(sizes), False, **kwargs)
        for number, size in enumerate(sizes)
    ]


class Loss:
    """The mean loss of a micro-batch's samples by a function of scores and labels; counts its calls."""

    joins_tasks = True

    def __init__(self, function=cross_entropy, fewest=1):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)).to(FP64)
        self.function, self.fewest, self.sizes, self.tasks = function, fewest, [], []

    def __call__(self, batch):
        found = batch.samples
        inputs, labels = next(found.batches())[0] if isinstance(found, JointSamples) else found
        if len(labels) < self.fewest:
            raise ValueError("too few samples")
        self.sizes.append(len(labels))
        self.tasks.append(batch.task)
        return self.function(self.net(inputs), labels)


def objective_of(loss, sizes=(4,) * 6, weights=(1.0,) * 6, batch_size=8, **kwargs):
    buffer = CalibrationBuffer(sum(sizes), kwargs.pop("quota", "equal"))
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        buffer.add(TASKS[number], samples(number, size), weight=weight)
    return CalibrationObjective(ParameterVector(loss.net), buffer, loss, batch_size, **kwargs)


def task_by_task(loss, **kwargs):
    apart = Loss(loss.function)
    apart.joins_tasks = False
    objective = objective_of(apart, **kwargs)
    return objective.loss_and_grad(objective.vector.read())


def test_samples_that_count_the_same_fill_micro_batches_in_their_order():
    joined = join(batches_of([4, 4, 4, 4, 4, 4]), size=9)
    assert [len(batch.samples) for batch in joined] == [9, 9, 6]
    found = torch.cat([next(batch.samples.batches())[0][0] for batch in joined])
    assert torch.equal(found, torch.cat([samples(number)[0] for number in range(6)]))
    assert [batch.share for batch in joined] == pytest.approx([9 / 24, 9 / 24, 6 / 24], rel=1e-15)
    assert joined[0].task == "task 0, task 1, task 2"
    assert join(batches_of([1] * 6), size=6)[0].task == "task 0, task 1, task 2, ..."


def test_samples_share_a_micro_batch_only_with_those_of_equal_share():
    light, heavy = batches_of([2, 2, 2], share=0.1), batches_of([2, 2, 2], share=0.2)
    mixed = [batch for pair in zip(light, heavy, strict=True) for batch in pair]
    joined = join(mixed, size=6)
    assert [(len(batch.samples), round(batch.share, 12)) for batch in joined] == [(6, 0.3), (6, 0.6)]


@pytest.mark.parametrize(
    "change",
    [
        lambda batch, number: MicroBatch(batch.samples, batch.task, 0.1 + number, False),
        lambda batch, number: MicroBatch((torch.zeros(4, 3 + number), batch.samples[1]), batch.task, 0.1, False),
        lambda batch, number: MicroBatch({f"{number}": batch.samples[0]}, batch.task, 0.1, False),
        lambda batch, number: MicroBatch(batch.samples, batch.task, 0.1, False, logits=torch.zeros(4, 5)),
    ],
    ids=["share", "shape", "structure", "logits"],
)
def test_samples_that_differ_stay_in_micro_batches_of_their_own(change):
    batches = [change(batch, number) for number, batch in enumerate(batches_of([4, 4, 4]))]
    assert join(batches, size=100) == batches


def test_samples_with_a_label_that_losses_ignore_stay_apart_wherever_it_is():
    batches = batches_of([12, 12, 12])
    batches[1].samples[1][11] = -100  # a trial would not come to it
    joined = join(batches, size=24)
    assert sorted(batch.task for batch in joined) == ["task 0, task 2", "task 1"]


def test_micro_batches_stay_as_they_are_if_there_would_not_be_fewer():
    batches = batches_of([5, 5, 5])
    assert join(batches, size=5) == batches
    assert join(batches, size=2) == batches


def test_tasks_that_have_to_stay_apart_do():
    joined = join(batches_of([2, 2, 2, 2]), size=8, apart=lambda task: task == "task 1")
    assert sorted((batch.task, len(batch.samples)) for batch in joined if isinstance(batch.samples, JointSamples)) == [
        ("task 0, task 2, task 3", 6)
    ]
    assert [len(batch.samples[1]) for batch in joined if batch.task == "task 1"] == [2]


def test_a_range_of_joint_samples_shares_the_memory_of_the_tasks():
    parts = [samples(0), samples(1), samples(2)]
    middle = JointSamples(parts).view(slice(3, 9))
    assert [len(part[1]) for part in middle.parts] == [1, 4, 1]
    assert [part[0].data_ptr() for part in middle.parts] == [
        parts[0][0][3:].data_ptr(),
        parts[1][0].data_ptr(),
        parts[2][0].data_ptr(),
    ]


def test_joint_samples_are_selected_and_labelled_as_those_of_one_task():
    parts = [samples(0), samples(1)]
    labels = torch.cat([part[1] for part in parts])
    index = torch.tensor([6, 0, 3])
    joint = JointSamples(parts)
    assert torch.equal(joint.labels(), labels)
    assert torch.equal(joint.select(index).labels(), labels[index])
    with pytest.raises(TypeError, match="not stored"):
        joint.state()


def test_trials_hold_a_few_samples_of_each_task():
    (together, apart), *others = trials(join(batches_of([10, 1, 12], share=None), size=100))
    assert not others
    assert len(together.samples) == 17
    assert [len(batch.samples[1]) for batch in apart] == [8, 1, 8]
    assert sum(batch.share for batch in apart) == pytest.approx(1.0)


@pytest.mark.parametrize("batch_size", [4, 7, 8, 24])
def test_tasks_that_share_micro_batches_have_the_loss_and_gradient_they_have_apart(batch_size):
    loss = Loss()
    objective = objective_of(loss, batch_size=batch_size)
    theta = objective.vector.read()
    expected, expected_grad = task_by_task(loss)
    for _ in range(2):
        found, grad = objective.loss_and_grad(theta)
        assert found == pytest.approx(expected, rel=1e-13)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)
    assert objective.loss(theta) == pytest.approx(expected, rel=1e-13)


def test_a_pass_takes_as_few_micro_batches_as_the_samples_fill():
    loss = Loss()
    objective = objective_of(loss, batch_size=8)
    objective.loss(objective.vector.read())
    assert loss.sizes[-3:] == [8, 8, 8]  # after the trials
    loss.sizes.clear()
    objective.loss_and_grad(objective.vector.read())
    assert loss.sizes == [8, 8, 8]
    minibatch = next(objective.buffer.minibatches(12, torch.Generator().manual_seed(0)))
    loss.sizes.clear()
    objective.loss_and_grad(objective.vector.read(), minibatch)
    assert loss.sizes == [8, 4]


def test_samples_of_tasks_with_other_weights_stay_apart_and_count_as_they_should():
    weights = (1.0, 2.0, 1.0, 2.0, 1.0, 5.0)
    loss = Loss()
    objective = objective_of(loss, weights=weights, quota="utility", sizes=(4, 4, 4, 4, 4, 4))
    expected, expected_grad = task_by_task(loss, weights=weights, quota="utility")
    found, grad = objective.loss_and_grad(objective.vector.read())
    assert found == pytest.approx(expected, rel=1e-13)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)


def over_tokens(scores, labels):
    return cross_entropy(scores, torch.where(labels == 0, -100, labels))


def by_class(scores, labels):
    return cross_entropy(scores, labels, weight=torch.arange(1, 6, dtype=FP64))


def of_pairs(scores, labels):
    return cross_entropy(scores @ scores.T, torch.arange(len(scores)))


def summed(scores, labels):
    return cross_entropy(scores, labels, reduction="sum")


@pytest.mark.parametrize("function", [over_tokens, by_class, of_pairs, summed])
def test_tasks_stay_apart_if_the_loss_is_no_mean_over_samples(function):
    loss = Loss(function)
    objective = objective_of(loss)
    expected, expected_grad = task_by_task(loss)
    found, grad = objective.loss_and_grad(objective.vector.read())
    assert found == expected
    assert torch.equal(grad, expected_grad)
    assert loss.sizes[-6:] == [4] * 6


def test_tasks_stay_apart_if_the_loss_fails_on_as_few_samples_as_are_tried():
    loss, sizes = Loss(fewest=9), {"sizes": (12,) * 6, "batch_size": 24}
    objective = objective_of(loss, **sizes)
    assert objective.loss(objective.vector.read()) == task_by_task(loss, **sizes)[0]
    assert loss.sizes[-6:] == [12] * 6


def test_tasks_stay_apart_if_the_loss_does_not_say_that_it_may_be_given_several():
    loss = Loss()
    loss.joins_tasks = False
    objective = objective_of(loss)
    objective.loss(objective.vector.read())
    assert loss.tasks == TASKS


def test_a_task_with_parameters_of_its_own_goes_through_the_module_with_them():
    loss = Loss()
    own = {"task 2": {"2.bias": torch.arange(5, dtype=FP64)}}
    objective = objective_of(loss, as_task=OwnParameters(loss.net, own))
    theta = objective.vector.read()
    found = objective.loss(theta)
    apart = Loss()
    apart.joins_tasks = False
    expected = objective_of(apart, as_task=OwnParameters(apart.net, own)).loss(theta)
    assert found == pytest.approx(expected, rel=1e-13)
    assert found != pytest.approx(task_by_task(loss)[0], rel=1e-3)
    assert sorted(loss.sizes[-4:]) == [4, 4, 8, 8]


def test_a_module_is_given_several_tasks_unless_its_step_asks_for_the_task():
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 5)

        def training_step(self, batch):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Told(Module):
        def calibration_step(self, batch, task):
            return self.training_step(batch)

    module = Module()
    trainer = L.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    parts = [tuple(part.float() if part.is_floating_point() else part for part in samples(n)) for n in range(3)]
    trainer.fit(module, DataLoader(torch.utils.data.TensorDataset(*parts[0])))
    buffer = CalibrationBuffer()
    for task, part in zip(TASKS, parts, strict=False):
        buffer.add(task, part)
    found = CalibrationObjective(ParameterVector(module), buffer, ModuleLoss(module)).loss(
        ParameterVector(module).read()
    )
    expected = sum(module.training_step(part).item() for part in parts) / 3
    assert found == pytest.approx(expected, rel=1e-6)
    assert ModuleLoss(module).joins_tasks
    assert not ModuleLoss(Told()).joins_tasks


def evaluate_jointly():
    loss = Loss()
    objective = objective_of(loss)
    value, grad = objective.loss_and_grad(objective.vector.read())
    return value, grad.tolist(), loss.sizes


def test_processes_decide_as_one_and_share_the_joint_micro_batches():
    expected, expected_grad = task_by_task(Loss())
    (value, grad, first), (other_value, other_grad, second) = run_job(evaluate_jointly, 2)
    assert (value, grad) == (other_value, other_grad)
    assert value == pytest.approx(expected, rel=1e-13)
    assert grad == pytest.approx(expected_grad.tolist(), rel=1e-12)
    assert (first[-2:], second[-2:]) == ([8, 4], [4, 8])

import torch
from images import make_model, make_stream, make_trainer
from torch.nn.functional import cross_entropy

from lightning_odem.studies.finetuning import load_own
from lightning_odem.studies.joint import JointData, JointTraining


def with_heads(stream):
    module = make_model()
    for task in stream:
        head = {"weight": torch.randn(3, 6), "bias": torch.zeros(3)}
        load_own(module, {f"heads.{task.task_name}.{name}": value for name, value in head.items()})
    return module


def test_the_loss_is_the_mean_over_tasks():
    stream = make_stream()
    joint = JointTraining(with_heads(stream))
    trainer = make_trainer(max_steps=1, max_epochs=-1)
    trainer.fit(joint, datamodule=JointData(list(stream)))
    batch = next(iter(JointData(list(stream)).train_dataloader()))[0]
    expected = sum(cross_entropy(joint.module(images, task), labels) for task, (images, labels) in batch.items()) / 3
    torch.testing.assert_close(joint.training_step(batch, 0), expected)


def test_smaller_tasks_go_round():
    stream = make_stream(2)
    stream["b"].batch_size = 4
    loader = JointData([stream["a"], stream["b"]]).train_dataloader()
    batches = [batch for batch, _, _ in loader]
    assert len(batches) == 9
    assert all(set(batch) == {"a", "b"} for batch in batches)


def test_joint_training_lowers_the_loss_of_every_task():
    stream = make_stream()
    joint = JointTraining(with_heads(stream))
    tasks = list(stream)

    def losses():
        return [
            cross_entropy(joint.module(*map(torch.stack, [[x for x, _ in task.splits.train]]), task.task_name), labels)
            for task in tasks
            for labels in [torch.as_tensor(task.splits.train.targets)]
        ]

    before = losses()
    make_trainer(max_epochs=5).fit(joint, datamodule=JointData(tasks))
    assert all(after < first for after, first in zip(losses(), before, strict=True))

import pytest
import torch
from toy import Classifier, Task, make_trainer

from lightning_odem.calibration.task_data import TaskData
from lightning_odem.parameters.vector import ParameterVector


class Greedy(Classifier):
    """Takes its batches apart and changes what was in them."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch.pop(0), batch.pop()), batch_idx)

    def features(self, inputs):
        return self.body(inputs.mul_(2))


class WithPredictionStep(Greedy):
    def prediction_step(self, batch, task):
        targets = batch.pop()
        return self(batch.pop().mul_(2)), targets


@pytest.mark.parametrize("kind", [Greedy, WithPredictionStep])
def test_a_module_gets_each_batch_as_the_dataloader_made_it_however_often_it_is_asked(kind):
    module, trainer = kind(), make_trainer()
    trainer.fit(module, datamodule=Task(0))
    data = TaskData(ParameterVector(module), module, "digits", trainer.train_dataloader)
    batch = next(iter(data))
    before = [leaf.clone() for leaf in batch]
    with torch.no_grad():
        for ask in (data.features, lambda batch: data.predictions(batch)[0]):
            assert torch.equal(ask(batch), ask(batch))
    assert all(map(torch.equal, batch, before))

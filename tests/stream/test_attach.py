import lightning as L
import torch
from toy import Classifier, make_trainer

from lightning_odem.calibration.loss import move_to_device
from lightning_odem.stream.attach import attached
from lightning_odem.stream.evaluation import score


class Hooked(Classifier):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]


def test_the_module_works_as_in_a_trainer_and_is_free_afterwards():
    module = Hooked()
    with attached(module) as trainer:
        assert module.trainer is trainer
        assert not module.training
        inputs, _ = move_to_device(module, (torch.zeros(2, 4), torch.zeros(2)))
        assert torch.equal(inputs.cpu(), torch.ones(2, 4))
    assert module._trainer is None
    assert module.training
    assert next(module.parameters()).device.type == "cpu"


def test_precision_and_limits_are_those_of_the_other_trainer():
    module = Classifier()
    batches = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))] * 3
    seen = []
    module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with attached(module, make_trainer(precision="bf16-mixed", limit_test_batches=2)):
        score(module, batches, "any")
    assert seen == [torch.bfloat16] * 2


def test_a_module_of_a_fit_goes_back_to_its_trainer():
    module, trainer = Classifier(), make_trainer()
    module.trainer = trainer
    with attached(module, trainer), torch.no_grad():
        pass
    assert module.trainer is trainer


def test_an_exception_frees_the_module_too():
    module = L.LightningModule()
    try:
        with attached(module):
            raise RuntimeError
    except RuntimeError:
        pass
    assert module._trainer is None

import math
from collections import UserDict

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_odem.calibration import MicroBatch
from lightning_odem.calibration.keeping import keep, keep_items
from lightning_odem.calibration.loss import ModuleLoss, move_to_device
from lightning_odem.calibration.prediction_loss import EntropyLoss

INPUTS = torch.arange(12.0).view(4, 3) / 10
LABELS = torch.tensor([0, 1, 1, 0])
BATCH = MicroBatch((INPUTS, LABELS), "digits", 0.5, False)


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)

    def loss(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.log_dict({"a": loss, "b": loss}, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithCalibrationStep(Classifier):
    def calibration_step(self, batch, task):
        self.asked = task
        return 2 * self.loss(batch)


class Dictionary(Classifier):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "scores": None}


class Brief(Classifier):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class Underscored(Classifier):
    def training_step(self, batch, _):
        return super().training_step(batch, 0)


class AnyArguments(Classifier):
    def training_step(self, *args):
        return super().training_step(*args)


class Scaling(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=2)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 10, batch[1]


class AtTheEnd(L.Callback):
    def __init__(self, function):
        self.function = function

    def on_train_end(self, trainer, pl_module):
        self.result = self.function(pl_module)


def in_fit(module, function, datamodule=None, **settings):
    """What ``function(module)`` returns at the end of a real fit of one step."""
    callback = AtTheEnd(function)
    trainer = L.Trainer(accelerator="cpu", fast_dev_run=1, enable_progress_bar=False, callbacks=[callback], **settings)
    trainer.fit(module, datamodule=datamodule or Plain())
    return callback.result


class Plain(L.LightningDataModule):
    train_dataloader = Scaling.train_dataloader


def by_hand(module, inputs=INPUTS):
    return cross_entropy(module.net(inputs), LABELS)


@pytest.mark.parametrize("kind", [Classifier, Dictionary, Brief, Underscored, AnyArguments])
def test_training_step_gives_the_loss_whatever_its_signature(kind):
    module = kind()
    loss = in_fit(module, lambda module: ModuleLoss(module)(BATCH))
    assert torch.equal(loss, by_hand(module))
    assert loss.requires_grad
    assert loss.shape == ()


def test_calibration_step_is_preferred_and_told_the_task():
    module = WithCalibrationStep()
    loss = in_fit(module, lambda module: ModuleLoss(module)(BATCH))
    assert torch.equal(loss, 2 * by_hand(module))
    assert module.asked == "digits"


@pytest.mark.parametrize("own", [False, True])
def test_logging_is_silent_during_the_loss_and_as_before_afterwards(own):
    module, logged = Classifier(), []

    def loss(module):
        if own:
            module.log = lambda *args, **kwargs: logged.append(args)
        before = dict(vars(module))
        module.trainer.callback_metrics.clear()
        ModuleLoss(module)(BATCH)
        assert not module.trainer.callback_metrics
        assert dict(vars(module)) == before
        return module.log

    log = in_fit(module, loss)
    assert not logged
    if not own:
        assert log == module.log
        assert log.__func__ is L.LightningModule.log


def test_logging_comes_back_after_an_error():
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if len(batch[0]) == 4:
                raise RuntimeError("no")
            return super().training_step(batch, batch_idx)

    def loss(module):
        with pytest.raises(RuntimeError, match="no"):
            ModuleLoss(module)(BATCH)
        return module.__dict__.keys() & {"log", "log_dict"}

    assert in_fit(Failing(), loss) == set()


def test_a_module_that_optimises_manually_needs_a_calibration_step():
    module, other = Classifier(), WithCalibrationStep()
    module.automatic_optimization = other.automatic_optimization = False
    with pytest.raises(TypeError, match=r"Classifier optimises manually.*calibration_step\(batch, task\)"):
        ModuleLoss(module)
    ModuleLoss(other)


@pytest.mark.parametrize(
    ("result", "name"),
    [(torch.zeros(2), "Tensor"), (None, "NoneType"), (1.0, "float"), ({"scores": torch.zeros(())}, "dict")],
)
def test_a_loss_that_is_no_scalar_is_refused(result, name):
    module = WithCalibrationStep()
    module.calibration_step = lambda batch, task: result
    with pytest.raises(TypeError, match=rf"WithCalibrationStep on task 'digits' must be a scalar.* got {name}"):
        in_fit(module, lambda module: ModuleLoss(module)(BATCH))


def test_a_loss_of_one_element_is_a_scalar():
    module = WithCalibrationStep()
    module.calibration_step = lambda batch, task: module.loss(batch).view(1, 1)
    assert in_fit(module, lambda module: ModuleLoss(module)(BATCH)).shape == ()


@pytest.mark.parametrize(("transferred", "expected"), [(False, (INPUTS + 1) * 10), (True, INPUTS)])
def test_transfer_hooks_of_the_datamodule_apply_once(transferred, expected):
    module = Classifier()
    batch = MicroBatch(BATCH.samples, "digits", 1.0, transferred)
    loss = in_fit(module, lambda module: ModuleLoss(module)(batch), Scaling())
    assert torch.equal(loss, by_hand(module, expected))


def test_transfer_hooks_of_the_module_apply_once():
    class Doubling(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

    def both(module):
        return [move_to_device(module, BATCH.samples, transferred)[0] for transferred in (False, True)]

    moved = in_fit(Doubling(), both)
    assert torch.equal(moved[0], INPUTS * 2)
    assert torch.equal(moved[1], INPUTS)


@pytest.mark.parametrize(
    ("precision", "seen", "computed"),
    [("bf16-true", torch.bfloat16, torch.bfloat16), ("64-true", *[torch.float64] * 2)],
)
def test_batches_come_in_the_trainers_precision_and_integers_stay(precision, seen, computed):
    samples = {"x": INPUTS, "image": torch.zeros(4, 2, dtype=torch.uint8), "y": LABELS}
    moved = in_fit(Classifier(), lambda module: move_to_device(module, samples), precision=precision)
    assert [tensor.dtype for tensor in moved.values()] == [seen, torch.uint8, torch.int64]
    assert in_fit(Classifier(), lambda module: ModuleLoss(module)(BATCH).dtype, precision=precision) == computed


class Rough(Classifier):
    """Relies on contiguous batches of its own, and uses them up."""

    def training_step(self, batch, batch_idx):
        inputs, targets = batch.pop(0), batch.pop()
        return cross_entropy(self.net(inputs.view(-1).mul_(2).view(-1, 3)), targets.view(-1).mul_(-1).add_(1))

    def prediction_step(self, batch, task):
        return self.net(batch.pop(0).view(-1).mul_(2).view(-1, 3)), None


@pytest.mark.parametrize("kind", [ModuleLoss, EntropyLoss])
def test_a_step_may_do_with_a_micro_batch_what_it_may_with_a_dataloaders(kind):
    pair = [torch.arange(24.0).view(8, 3), torch.arange(8) // 2 % 2]
    batch = MicroBatch(pair, "digits", 1.0, False).view(slice(1, None, 2))
    before = [leaf.clone() for leaf in batch.samples]

    def twice(module):
        loss = kind(module)
        return loss(batch).item(), loss(batch).item()

    first, second = in_fit(Rough(), twice)
    assert first == second
    assert all(map(torch.equal, batch.samples, before))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_have_the_memory_format_that_the_dataloader_gave_them(memory_format):
    images = torch.randn(8, 3, 2, 2).to(memory_format=memory_format)
    found = []

    class Seeing(WithCalibrationStep):
        def calibration_step(self, batch, task):
            found.append(batch[0])
            return self.net.weight.sum()

    batch = MicroBatch((images,), "digits", 1.0, False).view(slice(0, None, 2))
    in_fit(Seeing(), lambda module: ModuleLoss(module)(batch))
    assert found[0].is_contiguous(memory_format=memory_format)
    assert torch.equal(found[0], images[::2])


def test_the_loss_runs_under_autocast_where_the_trainer_does():
    module = WithCalibrationStep()
    module.calibration_step = lambda batch, task: module.net(batch[0]).sum()
    assert in_fit(module, lambda module: ModuleLoss(module)(BATCH).dtype, precision="bf16-mixed") == torch.bfloat16


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_step_may_say_over_how_many_its_loss_is_a_mean(kind):
    module = WithCalibrationStep()
    module.calibration_step = lambda batch, task: kind([module.loss(batch), torch.tensor(7)])
    found = in_fit(module, lambda module: ModuleLoss(module)(BATCH))
    assert torch.equal(found.loss, by_hand(module))
    assert found.count == 7.0


@pytest.mark.parametrize("number", [-1, math.nan, torch.tensor(math.inf)])
def test_a_count_that_is_none_is_refused(number):
    module = WithCalibrationStep()
    module.calibration_step = lambda batch, task: (module.loss(batch), number)
    with pytest.raises(ValueError, match="the count is 0 or a positive number"):
        in_fit(module, lambda module: ModuleLoss(module)(BATCH))


IGNORED = torch.full((4, 3), -100)
FIRST_ONLY = IGNORED.index_fill(1, torch.tensor([0]), 1)


@pytest.mark.parametrize("labels", [IGNORED, FIRST_ONLY, IGNORED[:, 0]])
@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), lambda x, y: UserDict(x=x, labels=y)])
def test_a_batch_whose_labels_are_all_ignored_counts_nothing(wrap, labels):
    module = WithCalibrationStep()
    module.calibration_step = lambda batch, task: module.net(INPUTS).sum() * math.nan
    batch = MicroBatch(keep(wrap(INPUTS, labels)), "digits", 1.0, False)
    assert in_fit(module, lambda module: ModuleLoss(module)(batch)).count == 0.0
    module.calibration_step = lambda batch, task: module.net(INPUTS).sum()
    assert isinstance(in_fit(module, lambda module: ModuleLoss(module)(batch)), torch.Tensor)


def test_a_loss_that_is_not_finite_on_labels_that_count_stays():
    module = WithCalibrationStep()
    module.calibration_step = lambda batch, task: module.net(batch[0]).sum() * math.nan
    assert in_fit(module, lambda module: ModuleLoss(module)(BATCH)).isnan()


@pytest.mark.parametrize("counted", [False, True])
def test_samples_in_several_batches_have_the_loss_of_all_of_them(counted):
    items = [(torch.full((2 + number % 2, 3), float(number)), number % 2) for number in range(5)]
    batch = MicroBatch(keep_items(items, default_collate), "digits", 1.0, False)

    def step(batch, task):
        loss = batch[0].mean((1, 2)).mean() * module.net.weight.sum()
        return (loss, len(batch[0])) if counted else loss

    module = WithCalibrationStep()
    module.calibration_step = step
    found = in_fit(module, lambda module: ModuleLoss(module)(batch))
    assert not counted or found.count == 5
    loss = found.loss if counted else found
    assert torch.allclose(loss, 2.0 * module.net.weight.sum())


def test_a_step_that_takes_the_loaders_iterator_gets_one():
    class Iterating(Classifier):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    module = Iterating()
    assert torch.equal(in_fit(module, lambda module: ModuleLoss(module)(BATCH)), by_hand(module))


class InTraining(Classifier):
    """Its forward gives losses in training mode and scores in eval mode, as torchvision's detectors."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, inputs, labels):
        inputs = self.drop(self.norm(inputs))
        return {"class": cross_entropy(self.net(inputs + torch.rand(3)), labels)} if self.training else self.net(inputs)

    def training_step(self, batch, batch_idx):
        return sum(self(*batch).values())


def test_a_loss_that_is_given_in_training_mode_only_is_taken_there_with_norm_and_dropout_in_eval_mode():
    def losses(module):
        module.eval()
        loss = ModuleLoss(module)
        modes = [each.training for each in module.modules()]
        state = torch.get_rng_state()
        found = [loss(BATCH) for _ in range(2)]
        assert modes == [each.training for each in module.modules()]
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = cross_entropy(module.net(module.norm(INPUTS) + torch.rand(3)), LABELS)
        return found, expected

    (first, second), expected = in_fit(InTraining(), losses)
    assert torch.equal(first, second)
    assert torch.equal(first, expected)
    assert first.requires_grad


def test_the_mode_of_a_loss_is_found_on_the_first_batch_alone():
    class Once(InTraining):
        def training_step(self, batch, batch_idx):
            modes.append(self.training)
            return super().training_step(batch, batch_idx)

    def losses(module):
        module.eval()
        modes.clear()
        loss = ModuleLoss(module)
        for _ in range(3):
            loss(BATCH)

    modes = []
    in_fit(Once(), losses)
    assert modes == [False, True, True, True]


def test_a_step_that_fails_in_both_modes_raises_the_error_of_eval_mode():
    class Broken(Classifier):
        def training_step(self, batch, batch_idx):
            if self.broken:
                raise RuntimeError(f"training is {self.training}")
            return super().training_step(batch, batch_idx)

        broken = False

    def loss(module):
        module.broken = True
        ModuleLoss(module.eval())(BATCH)

    with pytest.raises(RuntimeError, match="training is False"):
        in_fit(Broken(), loss)

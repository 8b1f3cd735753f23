import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective, MicroBatch
from lightning_odem.calibration.loss import ModuleLoss
from lightning_odem.calibration.prediction_loss import (
    LOSSES,
    EntropyLoss,
    LogitsLoss,
    calibration_loss,
    entropy,
    kl_divergence,
)
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.stream.attach import attached

FP64 = torch.float64
INPUTS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(7) % 4


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Heads(Classifier):
    """The scores depend on the task, and on more of a batch than its inputs."""

    def prediction_step(self, batch, task):
        return len(task) * self(batch["x"]), batch.get("label")


class Giving(Classifier):
    def __init__(self, scores):
        super().__init__()
        self.given = scores

    def forward(self, inputs):
        return self.given


def batch_of(samples, task="digits", logits=None):
    return MicroBatch(samples, task, 1.0, False, logits)


def objective(module, kind, reference=None, batch_size=3):
    """The loss over two tasks of 4 and 3 samples, whose logits are ``reference``."""
    buffer = CalibrationBuffer(100, balanced=False)
    for task, rows in {"a": slice(4), "b": slice(4, 7)}.items():
        buffer.add(task, (INPUTS[rows].double(), LABELS[rows], torch.arange(7)[rows]))
    for task in buffer.counts if reference is not None else ():
        held = [batch.samples[2] for batch in buffer.micro_batches_of(task, 9)]
        buffer.store_logits(task, reference[held[0]])
    return CalibrationObjective(ParameterVector(module), buffer, calibration_loss(module, kind), batch_size)


def written_out(module, function):
    """Loss and gradient of the mean of both tasks, from one graph in fp64."""
    probabilities = module.net(INPUTS.double()).exp()
    per_sample = function(probabilities / probabilities.sum(1, keepdim=True))
    loss = (per_sample[:4].mean() + per_sample[4:].mean()) / 2
    gradient = torch.autograd.grad(loss, list(module.parameters()))
    return loss.item(), torch.cat([piece.flatten() for piece in gradient])


def test_the_logits_loss_and_its_gradient_are_the_divergence_written_out():
    module = Classifier().double()
    reference = torch.randn(7, 4, dtype=FP64, generator=torch.Generator().manual_seed(1))
    p_star = reference.exp() / reference.exp().sum(1, keepdim=True)
    expected_loss, expected = written_out(module, lambda p: (p_star * (p_star / p).log()).sum(1))
    with attached(module):
        calibration = objective(module, "logits", reference)
        loss, gradient = calibration.loss_and_grad(calibration.vector.read())
        assert calibration.loss(calibration.vector.read()) == pytest.approx(expected_loss, rel=1e-12)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_the_entropy_loss_and_its_gradient_are_the_entropy_written_out():
    module = Classifier().double()
    expected_loss, expected = written_out(module, lambda p: -(p * p.log()).sum(1))
    with attached(module):
        calibration = objective(module, "entropy")
        loss, gradient = calibration.loss_and_grad(calibration.vector.read())
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_loss_and_gradient_vanish_at_the_model_that_gave_the_logits():
    module = Classifier()
    with attached(module), torch.no_grad():
        logits = LogitsLoss(module).scores(batch_of((INPUTS, LABELS)))
    with attached(module):
        loss = LogitsLoss(module)(batch_of((INPUTS, LABELS), logits=logits))
        loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad.abs().max() < 1e-7 for parameter in module.parameters())


@pytest.mark.parametrize("samples", [INPUTS, [INPUTS], (INPUTS, LABELS), (INPUTS, torch.full((7,), -9))])
def test_inputs_alone_do_and_labels_are_not_read(samples):
    module = Classifier()
    with attached(module):
        assert torch.equal(LogitsLoss(module).scores(batch_of(samples)), module.net(INPUTS))


@pytest.mark.parametrize("samples", [{"x": INPUTS}, {"x": INPUTS, "label": LABELS}])
def test_prediction_step_is_preferred_and_told_the_task(samples):
    module = Heads()
    with attached(module):
        scores = EntropyLoss(module).scores(batch_of(samples))
    assert torch.equal(scores, 6 * module.net(INPUTS))
    assert scores.requires_grad


def test_prediction_step_may_leave_out_targets_that_are_not_there():
    module = Classifier()
    module.prediction_step = lambda batch, task: module(batch)
    with attached(module):
        assert torch.equal(EntropyLoss(module).scores(batch_of(INPUTS)), module.net(INPUTS))


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (torch.zeros(7), r"torch.float32 \[7\]"),
        (torch.zeros(7, 1), r"torch.float32 \[7, 1\]"),
        (torch.zeros(7, 4, 2), r"torch.float32 \[7, 4, 2\]"),
        (torch.zeros(14, 4), r"torch.float32 \[14, 4\]"),
        (torch.zeros(7, 4, dtype=torch.long), r"torch.int64 \[7, 4\]"),
        ((torch.zeros(7, 4), None), "tuple"),
        (None, "NoneType"),
    ],
)
@pytest.mark.parametrize("kind", ["logits", "entropy"])
def test_outputs_that_are_no_class_scores_are_refused(kind, scores, found):
    module = Giving(scores)
    message = rf"class scores of Giving.*\[7, C\] for 7 samples.* on task 'digits' it gave {found}\. .*prediction_step"
    with attached(module), pytest.raises(TypeError, match=message):
        calibration_loss(module, kind)(batch_of((INPUTS, LABELS), logits=torch.zeros(7, 4)))


def test_a_dictionary_needs_a_prediction_step():
    module = Classifier()
    with attached(module), pytest.raises(ValueError, match=r"got dict. Give Classifier a method prediction_step"):
        EntropyLoss(module)(batch_of({"x": INPUTS}))


def test_samples_without_logits_are_refused_with_what_to_do():
    module = Classifier()
    message = "samples of digits have no logits.*loss='labels' or loss='entropy', or merge its tasks anew"
    with attached(module), pytest.raises(ValueError, match=message):
        LogitsLoss(module)(batch_of((INPUTS, LABELS)))


def test_logits_of_another_number_of_classes_are_refused():
    module = Classifier()
    message = "On task 'digits' Classifier gives scores of 4 classes, but the model fine-tuned on the task gave 6"
    with attached(module), pytest.raises(ValueError, match=message):
        LogitsLoss(module)(batch_of((INPUTS, LABELS), logits=torch.zeros(7, 6)))


def test_a_detached_prediction_has_no_gradient():
    class Detached(Classifier):
        @torch.no_grad()
        def prediction_step(self, batch, task):
            return self(batch[0]), batch[1]

    module = Detached().double()
    calibration = objective(module, "entropy")
    with attached(module), pytest.raises(ValueError, match="The calibration loss has no gradient"):
        calibration.loss_and_grad(calibration.vector.read())


class AtTheEnd(L.Callback):
    def __init__(self, function):
        self.function = function

    def on_train_end(self, trainer, pl_module):
        self.result = self.function(pl_module)


class Scaling(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=2)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 10, batch[1]


@pytest.mark.parametrize(("transferred", "factor"), [(False, 10), (True, 1)])
@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("64-true", FP64)]
)
def test_scores_come_under_the_trainers_precision_and_transfer_hooks(precision, dtype, transferred, factor):
    module = Classifier()
    samples = MicroBatch((INPUTS, LABELS), "digits", 1.0, transferred)
    callback = AtTheEnd(lambda module: (LogitsLoss(module).scores(samples), EntropyLoss(module)(samples)))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", fast_dev_run=1, callbacks=[callback], precision=precision, **quiet).fit(
        module, datamodule=Scaling()
    )
    scores, loss = callback.result
    assert scores.dtype == dtype
    assert loss.dtype == (FP64 if dtype == FP64 else torch.float32)
    torch.testing.assert_close(scores.float(), module.float()(factor * INPUTS), rtol=0.05, atol=0.05)


def test_every_kind_of_loss_has_its_name():
    module = Classifier()
    kinds = {name: type(calibration_loss(module, name)) for name in LOSSES}
    assert kinds == {"labels": ModuleLoss, "logits": LogitsLoss, "entropy": EntropyLoss}


FP64 = torch.float64
INFINITE = float("inf")


def make_logits(*seeds, size=5, classes=4, dtype=FP64):
    return [3 * torch.randn(size, classes, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in seeds]


def by_hand(logits, reference):
    """Mean divergence from plain Python numbers."""
    total = 0.0
    for z, z_star in zip(logits.tolist(), reference.tolist(), strict=True):
        q, p = ([math.exp(value) / sum(map(math.exp, row)) for value in row] for row in (z, z_star))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(logits)


def test_the_divergence_is_that_of_the_reference_from_the_logits():
    logits, reference = make_logits(0, 1)
    assert kl_divergence(logits, reference).item() == pytest.approx(by_hand(logits, reference), rel=1e-13)
    assert kl_divergence(logits, reference) != kl_divergence(reference, logits)


def test_its_gradient_is_the_difference_of_the_probabilities():
    logits, reference = make_logits(0, 1)
    kl_divergence(logits.requires_grad_(), reference).backward()
    p, p_star = (z.detach().exp() / z.detach().exp().sum(1, keepdim=True) for z in (logits, reference))
    torch.testing.assert_close(logits.grad, (p - p_star) / 5, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_vanish_at_the_reference(dtype):
    (logits,) = make_logits(2, dtype=dtype)
    loss = kl_divergence(logits.clone().requires_grad_(), logits)
    assert (loss.item(), loss.dtype) == (0.0, torch.float32)
    logits.requires_grad_()
    kl_divergence(logits, logits.detach()).backward()
    assert logits.grad.abs().max() < 1e-7


def test_logits_kept_in_another_precision_are_compared():
    logits, reference = make_logits(0, 1)
    rounded = kl_divergence(logits, reference.to(torch.bfloat16))
    assert rounded.dtype == FP64
    assert rounded.item() == pytest.approx(by_hand(logits, reference), rel=0.05)


@pytest.mark.parametrize("classes", [2, 10])
def test_equal_scores_have_the_entropy_log_c(classes):
    assert entropy(torch.full((3, classes), 7.0, dtype=FP64)).item() == pytest.approx(math.log(classes), rel=1e-14)


def test_the_entropy_of_two_classes_and_its_gradient_are_those_of_a_coin():
    z = torch.tensor([[0.0, 1.5], [0.0, -0.5]], dtype=FP64, requires_grad=True)
    loss = entropy(z)
    loss.backward()
    for row, gradient in zip(z.tolist(), z.grad.tolist(), strict=True):
        p = 1 / (1 + math.exp(-row[1]))
        # dH/dz = p (1 - p) log((1 - p) / p) = -p (1 - p) z
        assert gradient[1] == pytest.approx(-p * (1 - p) * row[1] / 2, rel=1e-12)
    coins = [1 / (1 + math.exp(-row[1])) for row in z.tolist()]
    expected = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in coins) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-13)


def test_large_scores_do_not_overflow():
    logits = torch.tensor([[0.0, 2000.0], [500.0, -500.0]])
    assert entropy(logits) == 0.0
    assert kl_divergence(logits, logits.flip(1)) == 1500.0


def test_masked_classes_count_nothing():
    logits, reference = make_logits(0, 1)
    masked = [torch.cat([z, torch.full((5, 1), -INFINITE, dtype=FP64)], dim=1).requires_grad_() for z in make_logits(0)]
    wide = torch.cat([reference, torch.full((5, 1), -INFINITE, dtype=FP64)], dim=1)
    for function, narrow in (
        (lambda z: kl_divergence(z, wide), kl_divergence(logits, reference)),
        (entropy, entropy(logits)),
    ):
        loss = function(masked[0])
        torch.testing.assert_close(loss.detach(), narrow, rtol=1e-13, atol=0)
        (gradient,) = torch.autograd.grad(loss, masked[0])
        assert gradient.isfinite().all()
        assert not gradient[:, -1].any()

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lightning_odem.calibration import CalibrationBuffer, CalibrationOptions
from lightning_odem.calibration.buffer import QUOTAS
from lightning_odem.calibration.prediction_loss import LOSSES


def test_defaults_are_those_of_the_buffer():
    buffer, options = CalibrationBuffer(), CalibrationOptions()
    assert (options.quota, options.seed) == (buffer.quota, buffer.seed)
    assert vars(options.buffer(1024)) == vars(buffer)


def test_options_make_the_buffer_and_only_labels_balance_it():
    buffer = CalibrationOptions(quota="utility", seed=3, shares="equal").buffer(7)
    assert (buffer.capacity, buffer.quota, buffer.seed, buffer.balanced) == (7, "utility", 3, True)
    for task, weight in {"a": 1.0, "b": 2.0}.items():
        buffer.add(task, torch.zeros(9, 2), weight=weight)
    assert buffer.shares() == {"a": 0.5, "b": 0.5}
    assert [CalibrationOptions(loss=loss).buffer(1).balanced for loss in LOSSES] == [True, False, False]


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_logits_loss_refuses_samples_without_logits(loss):
    options = CalibrationOptions(loss=loss)
    buffer = options.buffer(4)
    options.check(buffer)
    for task in ("a", "b", "c"):
        buffer.add(task, torch.zeros(1, 2))
    buffer.store_logits("b", torch.zeros(1, 2))
    if loss == "logits":
        with pytest.raises(ValueError, match=r"samples of a, c have no logits.*Continue this stream with"):
            options.check(buffer)
    else:
        options.check(buffer)


@pytest.mark.parametrize("quota", QUOTAS)
def test_known_quotas_are_taken(quota):
    assert CalibrationOptions(quota=quota).quota == quota


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "large"}, "'auto' or 'as trained', got 'large'"),
        ({"quota": "fair"}, "quota 'fair'; .* equal, utility"),
        ({"loss": "margin"}, "loss 'margin'; .* labels, logits, entropy"),
        ({"shares": "fair"}, "shares 'fair'; .* quota, equal, utility"),
    ],
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CalibrationOptions(**settings)


def test_micro_batches_as_trained_are_of_the_training_loaders_size_where_it_is_known():
    dataset, options = TensorDataset(torch.zeros(9, 2)), CalibrationOptions(batch_size="as trained")
    sampler = BatchSampler(SequentialSampler(dataset), 3, drop_last=False)
    loaders = [DataLoader(dataset, 7), DataLoader(dataset, batch_sampler=sampler), None, [torch.zeros(2)]]
    assert [options.micro_batch_size(loader) for loader in loaders] == [7, 3, 128, 128]
    assert CalibrationOptions(batch_size=5).micro_batch_size(loaders[0]) == 5


def test_micro_batches_are_of_the_size_that_was_found_once_it_is_known():
    options = CalibrationOptions(batch_size="auto")
    assert [options.micro_batch_size(None, found) for found in (None, 32)] == [128, 32]
    assert CalibrationOptions(batch_size=5).micro_batch_size(None, 32) == 5

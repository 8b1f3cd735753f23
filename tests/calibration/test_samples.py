import pytest
import torch

from lightning_odem.calibration import MicroBatch, TaskSamples

LOGITS = torch.arange(8.0).view(4, 2)
INPUTS = torch.arange(4, dtype=torch.uint8).view(4, 1)
HELD = [TaskSamples((INPUTS, torch.arange(4)), 2.0, True, LOGITS), MicroBatch([INPUTS], "a", 0.5, False, LOGITS)]


@pytest.mark.parametrize("held", HELD)
def test_a_selection_takes_the_logits_of_its_samples_along_as_copies(held):
    chosen = held.select(torch.tensor([3, 1]))
    assert chosen.samples[0].flatten().tolist() == [3, 1]
    assert chosen.logits.tolist() == [[6, 7], [2, 3]]
    assert chosen.logits.untyped_storage().nbytes() == 2 * 2 * 4
    assert {name: value for name, value in vars(chosen).items() if name not in ("samples", "logits")} == {
        name: value for name, value in vars(held).items() if name not in ("samples", "logits")
    }


def test_a_view_shares_memory_and_a_batch_is_all_of_it():
    batch = HELD[0].view(slice(1, 3)).as_batch("digits", 0.25)
    assert (batch.task, batch.share, batch.transferred) == ("digits", 0.25, True)
    assert batch.samples[0].flatten().tolist() == [1, 2]
    assert batch.logits.data_ptr() == LOGITS[1:].data_ptr()


def test_samples_without_logits_stay_without():
    held = TaskSamples((INPUTS,))
    assert held.select(slice(2)).logits is held.view(slice(2)).logits is held.as_batch("a", 1.0).logits is None


def test_the_state_is_that_of_the_fields_after_samples_are_counted():
    held = TaskSamples((INPUTS,))
    assert len(held) == 4
    assert set(held.state()) == {"samples", "weight", "transferred", "logits"}

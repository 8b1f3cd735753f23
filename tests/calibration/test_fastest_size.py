import lightning as L
import pytest
import torch
from job import run_job
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem.calibration import CalibrationBuffer, CalibrationObjective, CalibrationOptions
from lightning_odem.calibration.fastest_size import fastest_micro_batches, fastest_size
from lightning_odem.calibration.joint import JointSamples
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.stream.stream import Stream


def device(free_up_to, room):
    """Seconds of a pass on a device that works on some samples at once, and has memory for some."""
    tried = []

    def seconds(size):
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError
        return float(max(size, free_up_to))

    return seconds, tried


@pytest.mark.parametrize(
    ("free_up_to", "room", "largest", "expected", "tries"),
    [
        (64, 1000, 1000, 64, [16, 32, 64, 128]),  # until it stops to pay
        (1000, 100, 1000, 64, [16, 32, 64, 128]),  # until memory says no
        (1000, 1000, 100, 100, [16, 32, 64, 100]),  # until there are no more samples
        (1000, 5, 1000, 4, [16, 8, 4]),
        (1000, 1, 1000, 1, [16, 8, 4, 2, 1]),
        (1000, 1000, 3, 3, [3]),
    ],
)
def test_sizes_are_doubled_until_they_do_not_pay_or_do_not_fit(free_up_to, room, largest, expected, tries):
    seconds, tried = device(free_up_to, room)
    assert fastest_size(seconds, largest) == expected
    assert tried == tries


def test_a_sample_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        fastest_size(device(64, 0)[0], 100)


class Narrow(L.LightningModule):
    """Its loss needs more memory than there is for more than ``room`` samples."""

    def __init__(self, room):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.room, self.sizes = nn.Linear(4, 2), room, []

    def training_step(self, batch, batch_idx=0):
        if len(batch[1]) > self.room:
            raise torch.OutOfMemoryError
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Merges(L.Callback):
    """Merges three models of a stream, or continues one from its state."""

    def __init__(self, batch_size="auto", state=None, method="ode"):
        self.options, self.state, self.method = CalibrationOptions(batch_size=batch_size), state, method

    def on_fit_start(self, trainer, pl_module):
        base = take_snapshot(pl_module)
        generator = torch.Generator().manual_seed(0)
        stream = Stream(self.method, base=base, calibration_size=90, calibration=self.options)
        if self.state is not None:
            stream.state.load_state_dict(self.state)
        self.found = []
        for number in range(3):
            incoming = {name: value + torch.randn(value.shape, generator=generator) for name, value in base.items()}
            samples = torch.randn(50, 4, generator=generator), torch.arange(50) % 2
            stream.merge(pl_module, incoming, f"{len(stream.state.report.tasks)}-{number}", samples=samples)
            self.found.append(stream.state.measured.get("batch_size"))
        self.stream = stream


def merges(room=10**6, **options):
    callback = Merges(**options)
    trainer = L.Trainer(max_steps=0, callbacks=[callback], logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.fit(Narrow(room), DataLoader(TensorDataset(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))))
    return callback


def test_a_stream_finds_the_size_before_its_first_merge_of_two_models_and_keeps_it():
    first = merges(room=5)
    assert first.found == [None, 4, 4]
    state = first.stream.state.state_dict()
    assert merges(state=state).found == [4, 4, 4]  # a larger one would fit now
    again = merges(batch_size=4)
    assert again.found == [None, None, None]
    expected = again.stream.state.merged
    assert all(torch.equal(first.stream.state.merged[name], expected[name]) for name in expected)


def test_a_state_of_an_earlier_version_has_no_size():
    state = merges(batch_size=4).stream.state.state_dict()
    del state["measured"]
    assert merges(state=state, room=5).found == [4, 4, 4]


def test_a_rule_without_a_loss_needs_no_size():
    assert merges(method="average").found == [None, None, None]


def together():
    torch.manual_seed(0)
    net, buffer = nn.Linear(3, 2), CalibrationBuffer(64)
    buffer.add("a", (torch.randn(64, 3), torch.arange(64) % 2))
    rank = torch.distributed.get_rank()

    def batch_loss(batch):
        if rank == 1 and len(batch.samples[1]) > 5:  # there is less memory in the second process
            raise torch.OutOfMemoryError
        return cross_entropy(net(batch.samples[0]), batch.samples[1])

    return fastest_micro_batches(CalibrationObjective(ParameterVector(net), buffer, batch_loss))


def test_processes_agree_on_a_size_that_fits_in_all_of_them():
    assert run_job(together, 2) == [4, 4]


@pytest.mark.parametrize(("joins_tasks", "largest"), [(True, 48), (False, 4)])
def test_the_largest_size_is_that_of_the_samples_that_may_share_a_micro_batch(joins_tasks, largest):
    torch.manual_seed(0)
    net, buffer, sizes = nn.Linear(3, 2), CalibrationBuffer(48), []
    for number in range(12):
        buffer.add(f"task {number}", (torch.randn(4, 3), torch.arange(4) % 2))

    def batch_loss(batch):
        sizes.append(len(batch.samples if isinstance(batch.samples, JointSamples) else batch.samples[1]))
        found = next(batch.samples.batches())[0] if isinstance(batch.samples, JointSamples) else batch.samples
        return cross_entropy(net(found[0]), found[1])

    batch_loss.joins_tasks = joins_tasks
    fastest_micro_batches(CalibrationObjective(ParameterVector(net), buffer, batch_loss))
    assert max(sizes) <= largest
    assert largest == 4 or max(sizes) > 4

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import Classifier, Task, Watching, fit, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods.needs import Snapshots
from lightning_odem.methods.needs.snapshots import Trail

pytestmark = pytest.mark.usefixtures("small_stream")


def flat(named):
    return torch.cat([tensor.flatten() for tensor in named.values()])


def test_a_method_gets_the_weights_of_the_training_run():
    method, seen = Watching(Snapshots(5)), []

    class Recorded(Classifier):
        def on_train_batch_end(self, *_):
            seen.append(flat(weights(self)))

    fit(Recorded(), Task(0), ContinualMergeCallback(method=method))
    assert len(seen) == 6
    # After the fifth step every second one goes; the sixth is the incoming model.
    torch.testing.assert_close(torch.stack(list(method.contexts[0][Snapshots])), torch.stack([seen[1], seen[3]]))


@pytest.mark.parametrize("earlier", [False, True])
def test_snapshots_survive_an_interruption(tmp_path, earlier):
    whole, resumed = Watching(Snapshots(20)), Watching(Snapshots(20))
    fit(Classifier(), Task(0, "task_1"), ContinualMergeCallback(method=whole))
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1)
    broken = ContinualMergeCallback(method=Watching(Snapshots(20)))
    fit(Classifier(), Task(0, "task_1"), broken, checkpoint, max_epochs=1, enable_checkpointing=True)
    if earlier:  # as version 0.5 has written them
        content = torch.load(checkpoint.best_model_path, weights_only=True)
        started = content["callbacks"]["ContinualMergeCallback"]["started"]
        started["trail"] = started.pop("collected")["Snapshots"]
        torch.save(content, checkpoint.best_model_path)
    merge = ContinualMergeCallback(method=resumed)
    fit(Classifier(), Task(0, "task_1"), merge, ckpt_path=checkpoint.best_model_path)
    assert len(whole.contexts[0][Snapshots]) == 5
    torch.testing.assert_close(
        torch.stack(list(resumed.contexts[0][Snapshots])), torch.stack(list(whole.contexts[0][Snapshots]))
    )


def test_a_method_that_asks_for_fewer_than_two_snapshots_is_refused():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        fit(Classifier(), Task(0), ContinualMergeCallback(method=Watching(Snapshots(1))))


def test_a_run_too_short_for_snapshots_is_refused_and_not_merged():
    merge = ContinualMergeCallback(method=Watching(Snapshots()))
    with pytest.raises(ValueError, match="needs weights from the training run"):
        fit(Classifier(), Task(0), merge, max_steps=1, max_epochs=-1)
    assert merge.report.tasks == []


def trail_of(steps, capacity):
    trail = Trail(capacity)
    for step in range(1, steps + 1):
        trail.see(step, lambda step=step: {"step": torch.tensor(step)})
    return [int(snapshot["step"]) for snapshot in trail.before(steps)]


@pytest.mark.parametrize("capacity", [2, 4, 7])
@pytest.mark.parametrize("steps", [2, 3, 8, 9, 50, 257])
def test_snapshots_are_evenly_spaced_and_as_many_as_fit(steps, capacity):
    kept = trail_of(steps, capacity)
    stride = kept[0]
    assert kept == [stride * (index + 1) for index in range(len(kept))]
    assert len(kept) <= capacity
    # One more place of half the stride would have been too many, but for the last step, which is the incoming model.
    assert stride == 1 or steps // (stride // 2) > capacity


def test_a_trail_goes_on_from_its_state():
    whole, first = Trail(4), Trail(4)
    for step in range(1, 31):
        whole.see(step, lambda step=step: {"step": torch.tensor(step)})
        if step == 13:
            first = Trail(4, first.state)
        first.see(step, lambda step=step: {"step": torch.tensor(step)})
    assert [s["step"] for s in whole.before(31)] == [s["step"] for s in first.before(31)]

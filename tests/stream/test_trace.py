import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from toy import Classifier, Task, fit, weights

from lightning_odem import ContinualMergeCallback, MergeMethod, MergeResult
from lightning_odem.stream.trace import Epochs, Trail, check_second_moments, second_moments
from lightning_odem.tasks.sampler import EpochSampler

pytestmark = pytest.mark.usefixtures("small_stream")


class WithAdam(Classifier):
    optimizer = torch.optim.Adam

    def configure_optimizers(self):
        self.used = self.optimizer(self.parameters(), 0.01)
        return self.used


class Watching(MergeMethod):
    """Keeps what it is given and averages."""

    def __init__(self, *needs, snapshots=8):
        self.needs, self.snapshots, self.contexts = frozenset(needs), snapshots, []

    def start(self, incoming, context):
        self.contexts.append(context)
        return MergeResult(incoming)

    def merge(self, merged, incoming, t, context):
        self.contexts.append(context)
        return MergeResult(merged.lerp_(incoming, t))


def flat(named):
    return torch.cat([tensor.flatten() for tensor in named.values()])


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


def test_a_method_gets_the_second_moments_of_the_optimizer():
    module, method = WithAdam(), Watching("second_moments")
    fit(module, Task(0), ContinualMergeCallback(method=method))
    expected = {name: module.used.state[tensor]["exp_avg_sq"] for name, tensor in module.named_parameters()}
    assert torch.equal(method.contexts[0].second_moments, flat(expected))
    assert (flat(expected) > 0).any()


def test_parameters_that_the_optimizer_never_stepped_have_no_second_moment():
    class HeadOnly(WithAdam):
        def configure_optimizers(self):
            self.used = torch.optim.AdamW(self.head.parameters(), 0.01)
            return self.used

    module, method = HeadOnly(), Watching("second_moments")
    fit(module, Task(0), ContinualMergeCallback(method=method))
    moments = dict(zip(method.contexts[0].names, method.contexts[0].second_moments.split([32, 8, 24, 3]), strict=True))
    assert moments["body.0.weight"].isnan().all()
    assert moments["head.weight"].isfinite().all()


def test_an_optimizer_without_second_moments_is_refused_before_any_training():
    module = Classifier()
    before = weights(module)
    with pytest.raises(ValueError, match=r"'Watching' needs the optimizer's second moments .* SGD keeps none"):
        fit(module, Task(0), ContinualMergeCallback(method=Watching("second_moments")))
    assert all(torch.equal(before[name], value) for name, value in weights(module).items())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_optimizers_of_adams_family_will_do(optimizer):
    check_second_moments([optimizer([torch.nn.Parameter(torch.ones(2))], lr=0.1)], "any")


def test_the_moments_before_the_first_step_are_none():
    module = Classifier()
    assert second_moments([torch.optim.Adam(module.parameters())], module) == {}


def test_a_method_gets_the_weights_of_the_training_run():
    method, seen = Watching("snapshots", snapshots=5), []

    class Recorded(Classifier):
        def on_train_batch_end(self, *_):
            seen.append(flat(weights(self)))

    fit(Recorded(), Task(0), ContinualMergeCallback(method=method))
    assert len(seen) == 6
    # After the fifth step every second one goes; the sixth is the incoming model.
    torch.testing.assert_close(torch.stack(list(method.contexts[0].snapshots)), torch.stack([seen[1], seen[3]]))


def test_snapshots_survive_an_interruption(tmp_path):
    whole, resumed = Watching("snapshots", snapshots=20), Watching("snapshots", snapshots=20)
    fit(Classifier(), Task(0), ContinualMergeCallback(method=whole))
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1)
    broken = ContinualMergeCallback(method=Watching("snapshots", snapshots=20))
    fit(Classifier(), Task(0), broken, checkpoint, max_epochs=1, enable_checkpointing=True)
    merge = ContinualMergeCallback(method=resumed)
    fit(Classifier(), Task(0), merge, ckpt_path=checkpoint.best_model_path)
    assert len(whole.contexts[0].snapshots) == 5
    torch.testing.assert_close(
        torch.stack(list(resumed.contexts[0].snapshots)), torch.stack(list(whole.contexts[0].snapshots))
    )


def test_a_method_that_asks_for_fewer_than_two_snapshots_is_refused():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        fit(Classifier(), Task(0), ContinualMergeCallback(method=Watching("snapshots", snapshots=1)))


def test_a_method_gets_the_tasks_own_training_batches_and_their_gradients():
    class Data(Watching):
        def merge(self, merged, incoming, t, context):
            data = context.task_data
            batch = next(iter(data))
            scores = data.evaluate(incoming, lambda: data.predictions(batch)[0])
            loss, grad = data.value_and_grad(
                incoming, batch, lambda: torch.nn.functional.cross_entropy(*data.predictions(batch))
            )
            self.seen = batch, scores, loss, grad, incoming.clone()
            return super().merge(merged, incoming, t, context)

    module, method, merge_t = Classifier(), Data("task_data"), 0.5
    merge = ContinualMergeCallback(method=method)
    fit(module, Task(0), merge)
    task = Task(1)
    fit(module, task, merge)
    batch, scores, loss, grad, incoming = method.seen
    assert torch.equal(batch[0], task.train_set.tensors[0][:8])
    twin = Classifier()
    torch.nn.utils.vector_to_parameters(incoming, twin.parameters())
    expected = torch.nn.functional.cross_entropy(twin(batch[0]), batch[1])
    torch.testing.assert_close(scores, twin(batch[0]).detach())
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad, flat(dict(enumerate(torch.autograd.grad(expected, list(twin.parameters()))))))
    assert merge.report.merges[1].sample_gradients == 8
    assert merge.report.merges[1].t == merge_t


def test_nothing_is_collected_for_a_method_that_needs_nothing():
    method = Watching()
    merge = ContinualMergeCallback(method=method)
    fit(WithAdam(), Task(0), merge)
    context = method.contexts[0]
    assert context.second_moments is context.task_data is context.calibration is context.base is None
    assert len(context.snapshots) == 0


def test_a_run_too_short_for_snapshots_is_refused_and_not_merged():
    merge = ContinualMergeCallback(method=Watching("snapshots"))
    with pytest.raises(ValueError, match="needs weights from the training run"):
        fit(Classifier(), Task(0), merge, max_steps=1, max_epochs=-1)
    assert merge.report.tasks == []


def test_epochs_are_counted_from_zero_whatever_the_loader_was_used_for():
    dataset = TensorDataset(torch.arange(10))

    def loader():
        return DataLoader(dataset, batch_size=3, sampler=EpochSampler(dataset, seed=1))

    used = loader()
    used.sampler.set_epoch(5)
    list(used)
    first, second = Epochs(used), Epochs(loader())
    passes = [[torch.cat([batch[0] for batch in epochs]).tolist() for _ in range(2)] for epochs in (first, second)]
    assert passes[0] == passes[1]
    assert passes[0][0] != passes[0][1]
    assert len(list(Epochs(loader(), 2))) == 2


def test_the_limit_of_training_batches_holds_for_the_tasks_own_data():
    method = Watching("task_data")
    fit(Classifier(), Task(0), ContinualMergeCallback(method=method), limit_train_batches=2)
    assert len(list(method.contexts[0].task_data._batches)) == 2

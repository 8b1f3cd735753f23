"""What streams of models with adapters keep on disk: what moves, and fingerprints of the frozen base."""

import io

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from toy import make_trainer

from lightning_odem import ContinualMergeCallback, Stream
from lightning_odem.parameters import load_weights

pytest.importorskip("peft")
from adapted import Adapted, Record, Sequences, best_approximation, updates  # noqa: E402


def fit_tasks(module, merge, tasks, *callbacks, **options):
    for task in tasks:
        make_trainer(*callbacks, merge, **{"max_epochs": 2, **options}).fit(module, datamodule=task)
    return merge


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def relative(found, expected):
    distance = sum(float((found[name] - expected[name]).norm() ** 2) for name in expected)
    return (distance / sum(float(value.norm() ** 2) for value in expected.values())) ** 0.5


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_merge_writes_no_more_than_the_adapter(small_stream):
    # Large enough for the 20 kB of random state and report that every merge writes.
    module = Adapted(width=256, r=64)
    adapter = sum(each.nbytes for each in module.parameters() if each.requires_grad)
    whole = sum(each.nbytes for each in module.parameters())
    assert whole > 3 * adapter
    merge = ContinualMergeCallback("average", dirpath="stream_dir", evaluate=False)
    before = set()
    for task in (Sequences(0), Sequences(1)):
        fit_tasks(module, merge, [task], max_epochs=1)
        state = {path for path in small_stream.glob("stream_dir/stream/*") if path.is_file()}
        written = sum(path.stat().st_size for path in state - before)
        before |= state
    # The first merge writes the base model's adapter too.
    [*_, checkpoint] = sorted(small_stream.glob("stream_dir/merged-*.ckpt"))
    in_checkpoints = io.BytesIO()
    torch.save(merge.state_dict(), in_checkpoints)

    assert written < 1.1 * adapter
    assert checkpoint.stat().st_size < 1.1 * adapter
    assert in_checkpoints.tell() < 2.2 * adapter  # the base model's and the merged model's


def test_a_base_without_memory_is_no_obstacle_to_merges(small_stream):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(2**15, 2**15, bias=False, device="meta").requires_grad_(False)
            self.lora_A, self.lora_B = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.zeros(4, 2))
            self.scaling = 1.0

    module, stream = Large(), Stream("average")
    stream.check(module)
    stream.begin(module)
    for value in (1.0, 3.0):
        with torch.no_grad():
            module.lora_B.fill_(value)
        with stream.merging(module, f"task_{value}", 1.0) as addition:
            stream.state = addition.state(accuracy=[torch.nan] * (len(stream.state.report.tasks) + 1))
    torch.testing.assert_close(module.lora_B @ module.lora_A, torch.full((4, 8), 4.0))
    assert stream.state.merged.keys() == {"lora_A", "lora_B"}


@pytest.mark.parametrize("how", ["trainer", "load_weights", "load_task"])
def test_merged_weights_are_put_together_with_the_base(how, small_stream):
    module = Adapted()
    merge = fit_tasks(module, ContinualMergeCallback("average", dirpath="stream_dir"), [Sequences(0), Sequences(1)])
    other, merge = Adapted(), ContinualMergeCallback("average", dirpath="stream_dir")
    another = Adapted(seed=1)

    def load(into):
        if how == "trainer":
            make_trainer(merge).validate(into, Sequences(0), ckpt_path=merge.last_merged_path, verbose=False)
        elif how == "load_weights":
            load_weights(into, merge.last_merged_path)
        else:
            merge.load_task(into, "task_1")

    load(other)
    assert same(weights(module), weights(other))
    with pytest.raises(ValueError, match="another frozen base"):
        load(another)


def test_the_base_model_is_loaded_into_a_module_of_the_same_base_only(small_stream):
    module, base = Adapted(), weights(Adapted())
    merge = fit_tasks(module, ContinualMergeCallback("average"), [Sequences(0)])
    assert not same(base, weights(module))
    merge.load_base(module)
    assert same(base, weights(module))
    with pytest.raises(ValueError, match="another frozen base"):
        merge.load_base(Adapted(seed=1))


def test_another_base_is_refused_before_training(small_stream):
    fit_tasks(Adapted(), ContinualMergeCallback("average", dirpath="stream_dir"), [Sequences(0)])
    with pytest.raises(ValueError, match="another frozen base"):
        fit_tasks(Adapted(seed=1), ContinualMergeCallback("average", dirpath="stream_dir"), [Sequences(1)])


def test_a_frozen_weight_that_a_training_changes_is_refused(small_stream):
    class Change(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *others):
            with torch.no_grad():
                pl_module.model.base_model.model.norm.weight += 1.0

    merge = ContinualMergeCallback("average")
    with (
        pytest.warns(UserWarning, match="fine-tuned weights are saved"),
        pytest.raises(ValueError, match="another frozen base"),
    ):
        fit_tasks(Adapted(), merge, [Sequences(0)], Change())
    assert merge.report.tasks == []


def test_a_weight_that_a_later_task_trains_is_merged(small_stream):
    module = Adapted()
    merge = fit_tasks(module, ContinualMergeCallback("average", dirpath="stream_dir"), [Sequences(0)])
    name = "model.base_model.model.norm.weight"
    before, after = module.get_parameter(name).detach().clone(), []

    class Keep(L.Callback):
        def on_train_end(self, trainer, pl_module):
            after.append(pl_module.get_parameter(name).detach().clone())

    module.get_parameter(name).requires_grad_(True)
    fit_tasks(module, merge, [Sequences(1)], Keep())
    torch.testing.assert_close(module.get_parameter(name).detach(), before.lerp(after[0], 0.5))
    assert name in merge._stream.state.merged
    other = Adapted()  # where it is frozen again
    ContinualMergeCallback("average", dirpath="stream_dir").load_task(other, "task_1")
    assert same(weights(module), weights(other))


def test_a_weight_that_a_later_task_freezes_is_merged_still(small_stream):
    module = Adapted()
    head = module.model.base_model.model.classifier
    before = head.weight.detach().clone()
    head.requires_grad_(True)
    merge = fit_tasks(module, ContinualMergeCallback("average"), [Sequences(0)])
    moved = head.weight.detach().clone()
    head.requires_grad_(False)
    fit_tasks(module, merge, [Sequences(1)])
    torch.testing.assert_close(head.weight.detach(), moved.lerp(before, 0.5))


def test_a_training_resumed_in_the_middle_of_a_task_ends_in_the_same_merged_model(small_stream):
    module, merge = Adapted(), ContinualMergeCallback("average")
    fit_tasks(module, merge, [Sequences(0)])
    saving = ModelCheckpoint("saved", save_top_k=-1, every_n_epochs=1)
    trainer = make_trainer(merge, saving, max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, datamodule=Sequences(1))

    other, merge = Adapted(), ContinualMergeCallback("average")
    trainer = make_trainer(merge, max_epochs=3)
    trainer.fit(other, datamodule=Sequences(1), ckpt_path=sorted(small_stream.glob("saved/*.ckpt"))[1])
    assert merge.report.tasks == ["task_0", "task_1"]
    assert same(weights(module), weights(other))


@pytest.mark.parametrize("method", ["average", "closed_form", "ode"])
def test_a_task_is_taken_out_up_to_what_was_cut(method, small_stream):
    merge, module, record = ContinualMergeCallback(method, calibration_size=16), Adapted(), Record()
    incoming = []

    class Keep(L.Callback):
        def on_train_end(self, trainer, pl_module):
            incoming.append(weights(pl_module))

    # The updates of one task twice are of one rank together: nothing is cut.
    tasks = [Sequences(0), Sequences(0), Sequences(1)]
    tasks[1].task_name = "again"
    torch.manual_seed(0)
    fit_tasks(module, merge, tasks, record, Keep())
    cut = merge.report.merges[-1].discarded

    merge.remove("task_1", incoming[2])

    merge.load_task(module, "task_0")
    mean = {name: (record.updates[0][name] + record.updates[1][name]) / 2 for name in record.updates[0]}
    best = {name: best_approximation(update, 3) for name, update in mean.items()}
    assert merge.report.tasks == ["task_0", "again"]
    # The running average has what it was cut to; sums are kept whole.
    assert method != "average" or relative(updates(module), best) < 3 * cut
    assert merge.report.merges[-1].discarded < 0.5


def test_sums_of_updates_grow_by_one_adapter_with_each_task(small_stream):
    module = Adapted(width=256, r=8)
    adapter = sum(each.nbytes for each in module.parameters() if each.requires_grad)
    merge = ContinualMergeCallback("isotropic", dirpath="stream_dir", evaluate=False)
    for count in (1, 2, 3):
        fit_tasks(module, merge, [Sequences(count)], max_epochs=1)
        newest = max(small_stream.glob("stream_dir/stream/method-*"), key=lambda path: path.stat().st_mtime_ns)
        assert newest.stat().st_size < 1.1 * count * adapter

"""Streams of models with low-rank adapters through Lightning, with adapters of peft."""

import logging

import lightning as L
import pytest
import torch
from toy import make_trainer

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods import METHODS

pytest.importorskip("peft")
from adapted import Adapted, Record, Sequences, best_approximation, updates  # noqa: E402

KINDS = {
    "lora": {},
    "patterns": {"rank_pattern": {"value": 5}, "alpha_pattern": {"value": 40}, "use_rslora": True},
    "convolution": {"target_modules": ["conv", "embedding"]},
    "dora": {"use_dora": True},
}


def fit_tasks(module, merge, tasks, *callbacks, **options):
    for task in tasks:
        make_trainer(*callbacks, merge, **{"max_epochs": 2, **options}).fit(module, datamodule=task)
    return merge


def relative(found, expected):
    distance = sum(float((found[name] - expected[name]).norm() ** 2) for name in expected)
    return (distance / sum(float(value.norm() ** 2) for value in expected.values())) ** 0.5


class Diverged(L.Callback):
    """Spoils one number of an adapter at the end of a training, and keeps the factors."""

    def on_train_end(self, trainer, pl_module):
        factor = next(each for name, each in pl_module.named_parameters() if "lora_A" in name)
        factor.data.view(-1)[0] = torch.nan
        self.factors = {name: each.detach().clone() for name, each in pl_module.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("method", ["average", "isotropic", "closed_form", "ode"])
@pytest.mark.parametrize("before", [0, 1])
def test_adapters_that_diverged_are_refused_by_name_and_put_back(method, before, small_stream):
    module, merge, spoil = Adapted(), ContinualMergeCallback(method, evaluate=False), Diverged()
    fit_tasks(module, merge, [Sequences(number) for number in range(before)])
    with pytest.raises(ValueError, match=r"infinite or NaN values in .*lora_A"):
        fit_tasks(module, merge, [Sequences(before)], spoil)
    for name, factor in spoil.factors.items():
        torch.testing.assert_close(module.get_parameter(name), factor, rtol=0, atol=0, equal_nan=True)
    assert len(merge.report.tasks) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_update_is_the_best_of_its_rank_for_the_mean_of_the_products(kind, small_stream):
    module, record = Adapted(**KINDS[kind]), Record()
    merge = fit_tasks(module, ContinualMergeCallback("average"), [Sequences(0), Sequences(1)], record)

    first, second = record.updates
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    ranks = {name: 5 if kind == "patterns" and "value" in name else 3 for name in mean}
    # peft gives the updates of embeddings as [in, out], of convolutions as [out, in, width]; both are cut as matrices.
    best = {name: best_approximation(update, ranks[name]) for name, update in mean.items()}
    assert relative(updates(module), best) < 0.01
    assert merge.report.merges[1].discarded == pytest.approx(relative(best, mean), rel=0.01)
    assert merge.report.merges[0].discarded == 0.0


def test_of_several_tasks_the_mean_is_nearly_as_good_as_the_best_of_its_rank(small_stream):
    module, record = Adapted(), Record()
    fit_tasks(module, ContinualMergeCallback("average"), [Sequences(number) for number in range(4)], record)
    mean = {name: torch.stack([each[name] for each in record.updates]).mean(0) for name in record.updates[0]}
    best = {name: best_approximation(update, 3) for name, update in mean.items()}
    assert relative(updates(module), mean) < 1.1 * relative(best, mean)


def test_what_is_no_adapter_is_merged_as_ever(small_stream):
    module = Adapted(modules_to_save=["classifier"], lora_bias=True)
    names = [name for name, each in module.named_parameters() if each.requires_grad and "weight" not in name]
    assert len(names) == 3  # of the head and of both adapters
    kept = []

    class Keep(L.Callback):
        def on_train_end(self, trainer, pl_module):
            kept.append({name: pl_module.get_parameter(name).detach().clone() for name in names})

    fit_tasks(module, ContinualMergeCallback("average"), [Sequences(0), Sequences(1)], Keep())
    for name in names:
        torch.testing.assert_close(module.get_parameter(name), kept[0][name].lerp(kept[1][name], 0.5))


def test_the_first_task_is_merged_bit_by_bit(small_stream):
    module, record = Adapted(), Record()
    fit_tasks(module, ContinualMergeCallback("average"), [Sequences(0)], record)
    assert relative(updates(module), record.updates[0]) == 0.0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_merges_adapters(method, small_stream):
    module, record = Adapted(), Record()
    merge = ContinualMergeCallback(method, calibration_size=16)
    fit_tasks(module, merge, [Sequences(0, size=32), Sequences(1, size=32)], record, max_epochs=1)
    found = updates(module)
    assert all(value.isfinite().all() for value in found.values())
    assert relative(found, record.updates[1]) > 1e-4
    assert merge.report.merges[1].discarded < 1.0
    assert {each.shape for name, each in module.named_parameters() if "lora_A" in name} == {(3, 16), (3, 32)}


@pytest.mark.parametrize("method", ["average", "ode"])
def test_a_stream_that_another_process_goes_on_with_is_the_same_bit_by_bit(method, small_stream):
    def seeded(dirpath):
        L.seed_everything(0, verbose=False)
        return Adapted(), ContinualMergeCallback(method, calibration_size=16, dirpath=dirpath)

    tasks = [Sequences(number) for number in range(3)]
    module, merge = seeded("whole")
    fit_tasks(module, merge, tasks)
    for number in range(3):
        other, merge = seeded("parts")
        fit_tasks(other, merge, list(merge.remaining(tasks[: number + 1])))

    for (name, one), (_, two) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_adapters_found_are_told_once_in_a_line(small_stream, caplog):
    with caplog.at_level(logging.INFO):
        fit_tasks(Adapted(), ContinualMergeCallback("average"), [Sequences(0), Sequences(1)])
    lines = [record.message for record in caplog.records if "adapters" in record.message]
    assert sum("2 LoRA adapters of rank 3 found" in line for line in lines) == 1
    assert sum("of the adapters' updates cut to keep their rank" in line for line in lines) == 1


def test_excluded_adapters_are_kept_by_each_task(small_stream):
    module, record = Adapted(), Record()
    merge = ContinualMergeCallback("average", exclude=["*lora_*"])
    module.model.base_model.model.classifier.requires_grad_(True)
    fit_tasks(module, merge, [Sequences(0), Sequences(1)], record)
    for number in (0, 1):
        merge.load_task(module, f"task_{number}")
        assert relative(updates(module), record.updates[number]) == 0.0


def test_an_adapter_that_could_not_be_merged_rightly_is_refused_before_training(small_stream):
    module = Adapted()
    del module.model.base_model.model.query.scaling["default"]
    steps = []
    module.training_step = lambda *_: steps.append(0)
    with pytest.raises(ValueError, match="scale is not known"):
        fit_tasks(module, ContinualMergeCallback("average"), [Sequences(0)])
    assert not steps


def test_another_scale_than_before_is_refused_before_training(small_stream):
    merge = fit_tasks(Adapted(), ContinualMergeCallback("average"), [Sequences(0)])
    with pytest.raises(ValueError, match=r"is 4 times the product of its factors, and was 2 times"):
        fit_tasks(Adapted(lora_alpha=12), merge, [Sequences(1)])


@pytest.mark.slow
def test_a_stream_of_fifty_adapters_is_one_adapter(small_stream):
    module, sizes = Adapted(), []
    merge = ContinualMergeCallback("average", dirpath="stream_dir", evaluate=False)
    for number in range(50):
        options = {"max_steps": 1, "max_epochs": 1}
        fit_tasks(module, merge, [Sequences(number, size=16)], **options)
        merged = max(small_stream.glob("stream_dir/stream/merged-*.safetensors"), key=lambda path: path.stat().st_mtime)
        sizes.append(merged.stat().st_size)
    assert len(set(sizes)) == 1
    assert len(merge.report.tasks) == 50


def test_half_precision_does_not_round_from_merge_to_merge(small_stream):
    module = Adapted()
    merge = fit_tasks(module, ContinualMergeCallback("average"), [Sequences(0), Sequences(1)], precision="bf16-true")
    merged = merge._stream.state.merged
    assert {merged[name].dtype for name in merged if "lora_" in name} == {torch.float32}
    assert {each.dtype for name, each in module.named_parameters() if "lora_" in name} == {torch.bfloat16}


def test_a_stream_that_merged_factor_by_factor_goes_on_from_its_merged_model(small_stream):
    module, record = Adapted(), Record()
    merge = ContinualMergeCallback("isotropic")
    fit_tasks(module, merge, [Sequences(0)], record)
    state = merge._stream.state
    state.adapters, state.frozen = {}, {}  # as states of earlier versions
    base = dict(Adapted().state_dict())
    state.base, state.merged = base, {**base, **state.merged}
    state.method = {**state.method, "mean": {name: value - base[name] for name, value in state.merged.items()}}

    with pytest.warns(UserWarning, match="were merged one by one so far"):
        fit_tasks(module, merge, [Sequences(1)], record)
    assert merge.report.tasks == ["task_0", "task_1"]
    assert relative(updates(module), record.updates[1]) > 0.1

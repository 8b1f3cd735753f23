"""Other arithmetic, compiled modules, several processes."""

from pathlib import Path

import lightning as L
import pytest
import torch
from scripts import run_processes
from torch import nn
from toy import Classifier, Incoming, Task, close, everything, fit, make_trainer, same, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.report import StreamReport

pytestmark = pytest.mark.usefixtures("small_stream")


def stream(tasks=2, module=None, merge=None, **options):
    module, incoming = module or Classifier(), Incoming()
    merge = merge or ContinualMergeCallback()
    for number in range(tasks):
        trainer = fit(module, Task(number), incoming, merge, **options)
    return module, merge, incoming, trainer


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("64-true", torch.float64),
        ("bf16-true", torch.bfloat16),
    ],
)
def test_every_precision_merges_in_its_own_parameters(precision, dtype):
    module, merge, incoming, _ = stream(precision=precision)
    reference, expected, _, _ = stream()
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert merge.report.merges[1].path["scale"]
    assert merge.report.merges[1].loss_after == pytest.approx(expected.report.merges[1].loss_after, rel=0.05)
    assert {value.dtype for value in torch.load(merge.last_merged_path, weights_only=True)["state_dict"].values()} == {
        dtype
    }
    distance = {name: (value.float() - weights(reference)[name]).abs().max() for name, value in weights(module).items()}
    assert max(distance.values()) < 0.05


def test_double_precision_is_kept_from_fit_to_merged_model():
    module, merge, incoming, _ = stream(precision="64-true", merge=ContinualMergeCallback("average"))
    mean = {name: (incoming.models[0][name] + incoming.models[1][name]) / 2 for name in weights(module)}
    assert close(weights(module), mean, rtol=0, atol=1e-15)


def test_the_calibration_loss_is_computed_under_the_trainers_precision():
    class Seen(Classifier):
        dtypes = ()

        def calibration_step(self, batch, task):
            scores = self(batch[0])
            Seen.dtypes = {*self.dtypes, scores.dtype}  # on the module it would be put back
            return nn.functional.cross_entropy(scores, batch[1])

    module, _, _, _ = stream(module=Seen(), precision="bf16-mixed")
    assert module.dtypes == {torch.bfloat16}


def test_gradient_accumulation_and_clipping_do_not_reach_the_merge():
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}
    module, merge, incoming, _ = stream(**options)
    assert incoming.steps == [6, 6]
    # The same merge, made from the same models without either.
    assert same(weights(module), weights(merge_of(incoming.models)))


def merge_of(models, merge=None, **options):
    """The merge of models that nothing trains: every fit puts in the next one at its end."""
    merge = merge or ContinualMergeCallback(dirpath="again")

    class Replay(L.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.load_state_dict(models[len(merge.report.tasks)])

    module = Classifier(**options)
    for number in range(len(models)):
        fit(module, Task(number), Replay(), merge)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("what", ["module", "in_place", "submodule"])
def test_compiled_modules_are_merged_under_their_own_names(what):
    reference, expected, _, _ = stream()
    module = Classifier()
    if what == "in_place":
        module.compile(backend="eager")
    elif what == "submodule":
        module.body = torch.compile(module.body, backend="eager")
    fitted = torch.compile(module, backend="eager") if what == "module" else module
    merge = ContinualMergeCallback(dirpath="compiled")
    for number in range(2):
        make_trainer(merge).fit(fitted, datamodule=Task(number))
    names = {name.replace("_orig_mod.", ""): value for name, value in weights(module).items()}
    assert close(names, weights(reference), atol=1e-6)
    assert merge.report.accuracy == expected.report.accuracy
    assert merge.state_dict()["merged"].keys() == names.keys()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes made of streams of two tasks, and where."""
    directory = tmp_path_factory.mktemp("two_processes")
    run_processes(Path(__file__).parents[1] / "helpers" / "two_processes.py", directory, cwd=directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("finetune_from", ["base", "merged"])
def test_two_processes_merge_to_the_same_bits_and_write_once(two_processes, finetune_from):
    first, second = (torch.load(two_processes / f"{finetune_from}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["steps"] == second["steps"] == [6, 6]
    # The batch-norm statistics that come in are each process's own, those of the main process are merged.
    assert not any(map(same, first["incoming"], second["incoming"]))
    assert all(map(same, first["starts"], second["starts"]))
    assert all(map(same, first["merged"], second["merged"]))
    alone = ContinualMergeCallback(finetune_from=finetune_from, dirpath="alone")
    module = merge_of(first["incoming"], alone, batch_norm=True)
    assert close(everything(module), first["merged"][1], atol=1e-6)
    assert first["accuracy"] == second["accuracy"] == alone.report.accuracy
    run = two_processes / finetune_from
    expected = ["merged-01-task_1.ckpt", "merged-02-task_2.ckpt"]
    assert sorted(path.name for path in run.glob("*.ckpt")) == expected
    assert same(torch.load(run / expected[1], weights_only=True)["state_dict"], first["merged"][1])
    assert StreamReport.load(run / "report.json").accuracy == first["accuracy"]

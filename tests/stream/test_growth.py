"""Parameters with further rows in later tasks: the common rows are merged, the others are the last model's."""

import logging

import lightning as L
import pytest
import torch
from torch import nn
from toy import Classifier, Incoming, Task, everything, fit, same, weights

from lightning_odem import ContinualMergeCallback, ODEMerge

pytestmark = pytest.mark.usefixtures("small_stream")

ROWS = {"head.weight": 3, "head.bias": 3}


def grow_head(module, classes):
    """The head gets rows for more classes; those that it has stay."""
    head = nn.Linear(8, classes)
    with torch.no_grad():
        head.weight[: len(module.head.weight)] = module.head.weight
        head.bias[: len(module.head.bias)] = module.head.bias
    module.head = head


def grown_stream(method, tasks=3, **settings):
    """A head with 3, 5 and 6 classes; what came in, what was merged, and the base model."""
    torch.manual_seed(0)
    module, incoming = Classifier(), Incoming()
    merge = ContinualMergeCallback(method, growing=["head"], **settings)
    base, merged = everything(module), []
    for number, classes in enumerate((3, 5, 6)[:tasks]):
        if number:
            grow_head(module, classes)
        fit(module, Task(number), incoming, merge)
        merged.append(everything(module))
    return module, merge, incoming, base, merged


def test_common_rows_are_merged_and_further_rows_are_those_of_the_last_model():
    _, _, incoming, _, merged = grown_stream("average")
    for name, count in ROWS.items():
        common = torch.stack([model[name][:count] for model in incoming.models])
        torch.testing.assert_close(merged[-1][name][:count], common.mean(0))
        torch.testing.assert_close(merged[-1][name][count:], incoming.models[-1][name][count:])


@pytest.mark.parametrize("method", ["isotropic", "task_arithmetic", "opcm", ODEMerge(descent=0.0)])
def test_no_rule_moves_rows_that_the_tasks_before_did_not_have(method):
    _, _, incoming, _, merged = grown_stream(method)
    for name, count in ROWS.items():
        torch.testing.assert_close(merged[-1][name][count:], incoming.models[-1][name][count:])
        assert not torch.allclose(merged[-1][name][:count], incoming.models[-1][name][:count])


def test_a_training_starts_with_common_rows_of_the_base_and_further_rows_of_the_last_model():
    _, _, incoming, base, _ = grown_stream("average")
    start, before = incoming.starts[2], incoming.models[1]
    for name, count in ROWS.items():
        assert torch.equal(start[name][:count], base[name])
        assert torch.equal(start[name][count:5], before[name][count:])


def test_the_default_method_merges_a_growing_stream_and_goes_on_in_another_process(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        grown_stream("ode", tasks=2, dirpath=str(tmp_path))
    assert "head.weight has grown from 3 to 5 rows. The first 3 are merged" in caplog.text
    other, again = Classifier(classes=5), ContinualMergeCallback("ode", growing=["head"], dirpath=str(tmp_path))
    with torch.no_grad():
        other.head.weight[:3], other.head.bias[:3] = (Classifier().head.weight, Classifier().head.bias)
    fit(other, Task(2), again)
    assert again.report.tasks == ["task_1", "task_2", "task_3"]
    fresh = Classifier(classes=5)
    again.load_task(fresh, "task_3")
    assert same(weights(fresh), weights(other))


@pytest.mark.parametrize("method", ["closed_form", "task_singular_vectors"])
def test_a_method_that_keeps_more_of_the_tasks_before_is_refused_before_training(method):
    module, merge = Classifier(), ContinualMergeCallback(method, growing=["head"])
    fit(module, Task(0), merge)
    grow_head(module, 5)
    before = everything(module)
    with pytest.raises(ValueError, match="head.weight, head.bias has further rows, and what the merge method keeps"):
        fit(module, Task(1), merge)
    assert same(everything(module), before)


def test_rows_that_were_not_said_to_grow_are_refused_with_both_ways_out():
    module, merge = Classifier(), ContinualMergeCallback("average")
    fit(module, Task(0), merge)
    grow_head(module, 5)
    with pytest.raises(ValueError, match=r"exclude= leaves parameters out, growing= merges the common rows"):
        fit(module, Task(1), merge)


class WithTables(Classifier):
    """Tables that the module makes itself, longer with every task."""

    def on_fit_start(self):
        length = len(getattr(self, "cache", ())) + 2
        self.register_buffer("cache", torch.zeros(length), persistent=False)
        self.register_buffer("positions", torch.arange(float(length)))


def test_buffers_of_other_lengths_are_those_of_the_model_that_comes_in():
    module, merge = WithTables(), ContinualMergeCallback("average")
    module.on_fit_start()
    for number in range(2):
        fit(module, Task(number), merge)
    assert module.positions.tolist() == list(range(6))
    assert merge._state.merged["positions"].tolist() == list(range(6))
    assert "cache" not in merge._state.merged


def test_a_table_that_is_made_while_training_is_nobodys_business():
    class Caching(Classifier):
        def forward(self, inputs):
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.ones(1), persistent=False)
            return super().forward(inputs) * self.table

    module, merge = Caching(), ContinualMergeCallback("average")
    for number in range(2):
        fit(module, Task(number), merge)
    assert len(merge.report.tasks) == 2


def test_new_tokens_of_tied_embeddings_are_kept():
    transformers = pytest.importorskip("transformers")

    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            config = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
            config |= {"bos_token_id": 0, "eos_token_id": 0}
            self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))

        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss

        def prediction_step(self, batch, task):
            return self.model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def data(task):
        generator = torch.Generator().manual_seed(task)
        ids = torch.randint(5, 40 + 2 * task, (64, 6), generator=generator)
        return torch.utils.data.DataLoader([{"input_ids": one, "labels": one} for one in ids], 32)

    torch.manual_seed(0)
    net, merge, incoming = Net(), ContinualMergeCallback("average", growing=["model.transformer.wte"]), Incoming()
    for task in range(2):
        if task:
            net.model.resize_token_embeddings(42)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=1, callbacks=[incoming, merge], accelerator="cpu", **options)
        trainer.fit(net, data(task), data(task))
    name = "model.transformer.wte.weight"
    first, second = (model[name] for model in incoming.models)
    merged = net.state_dict()[name]
    torch.testing.assert_close(merged[:40], (first + second[:40]) / 2)
    torch.testing.assert_close(merged[40:], second[40:])
    assert net.model.lm_head.weight is net.model.transformer.wte.weight

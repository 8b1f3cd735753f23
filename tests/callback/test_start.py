"""The weights that a training starts with, and what sees them."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from toy import Classifier, Failing, Incoming, Task, everything, fit, same, weights

from lightning_odem import ContinualMergeCallback

pytestmark = pytest.mark.usefixtures("small_stream")


class Early(L.Callback):
    """Keeps the weights that tuners, finders and the sanity check see."""

    def __init__(self):
        self.seen = {}

    def on_fit_start(self, trainer, pl_module):
        self.seen["fit"] = everything(pl_module)

    def on_sanity_check_start(self, trainer, pl_module):
        self.seen["sanity"] = everything(pl_module)


def two_tasks(between=lambda module: None, **settings):
    module, merge, incoming = Classifier(batch_norm=True), ContinualMergeCallback("average", **settings), Incoming()
    base = everything(module)
    fit(module, Task(0), incoming, merge)
    merged = everything(module)
    between(module)
    before, early = everything(module), Early()
    fit(module, Task(1), early, incoming, merge, num_sanity_val_steps=1)
    return {"base": base, "merged": merged, "module": before}, incoming.starts[1], early.seen


@pytest.mark.parametrize("finetune_from", ["base", "merged", "module"])
def test_what_runs_before_the_training_sees_the_weights_that_it_starts_with(finetune_from):
    known, start, seen = two_tasks(finetune_from=finetune_from)
    assert same(start, known[finetune_from])
    assert same(seen["fit"], start)
    assert same(seen["sanity"], start)


def test_a_learning_rate_finder_starts_from_the_base_model_for_every_task():
    class Suggesting(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            starts.append(weights(pl_module))
            super().on_fit_start(trainer, pl_module)

    starts, module, merge = [], Classifier(), ContinualMergeCallback()
    base = weights(module)
    for number in range(2):
        fit(module, Task(number), Suggesting(num_training_steps=4), merge)
    assert same(starts[0], base)
    assert same(starts[1], base)


@torch.no_grad()
def shift(module):
    module.head.weight.add_(1.0)


@pytest.mark.parametrize("finetune_from", ["base", "merged"])
def test_weights_set_between_fits_are_not_overwritten_in_silence(finetune_from):
    with pytest.warns(UserWarning, match=f"changed after the last merge.*since finetune_from='{finetune_from}'"):
        known, start, _ = two_tasks(shift, finetune_from=finetune_from)
    assert same(start, known[finetune_from])


def test_weights_set_between_fits_can_be_trained_from():
    known, start, _ = two_tasks(shift, finetune_from="module")
    assert same(start, known["module"])
    assert not same(start, known["merged"])


def test_weights_that_a_broken_training_left_are_no_surprise():
    module, merge = Classifier(), ContinualMergeCallback("average")
    base = weights(module)
    fit(module, Task(0), merge)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, Task(1), merge, Failing("on_train_epoch_end", RuntimeError("power cut")))
    incoming = Incoming()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*changed after the last merge")
        fit(module, Task(1), incoming, merge)
    assert same({name: incoming.starts[0][name] for name in base}, base)


def test_another_choice_is_refused():
    with pytest.raises(ValueError, match="finetune_from is one of base, merged, module, got 'scratch'"):
        ContinualMergeCallback(finetune_from="scratch")

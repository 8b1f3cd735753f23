"""Streams by ContinualTrainer that several processes go through."""

import json

import lightning as L
import pytest
import torch
from images import make_model, make_stream, make_trainer

from lightning_odem import ContinualMergeCallback

pytestmark = pytest.mark.usefixtures("small_stream")


def run(directory, number=3):
    """One command: fit the first tasks of the stream, as far as they are not merged."""
    L.seed_everything(5, verbose=False)
    merge = ContinualMergeCallback(dirpath=directory, calibration_size=18)
    model = make_model()
    report = make_trainer(merge).fit_tasks(model, make_stream(number))
    return model, report


def shown(report):
    data = report.as_dict()
    for merge in data["merges"]:
        merge |= dict.fromkeys(("merge_seconds", "gradient_seconds", "evaluation_seconds", "checkpoint"))
    return json.dumps(data)


def test_the_same_command_with_more_tasks_goes_on_with_the_stream():
    model, whole = run("whole")
    run("parts", number=1)
    run("parts", number=2)
    other, report = run("parts")
    assert shown(report) == shown(whole)
    pairs = zip(model.backbone.parameters(), other.backbone.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def test_the_same_command_once_more_only_shows_the_table(capsys):
    _, report = run("run")
    capsys.readouterr()
    _, again = run("run")
    assert shown(again) == shown(report)
    assert "after c" in capsys.readouterr().out

import json
from importlib.metadata import version

import lightning as L
import pytest
import torch
from images import make_backbone, make_model, make_stream, make_trainer
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from lightning_odem import ContinualMergeCallback, TaskClassifier
from lightning_odem.methods import AverageMerge, ClosedFormMerge, MergeMethod, ODEMerge
from lightning_odem.methods.needs import SecondMoments
from lightning_odem.metrics import TaskMetric
from lightning_odem.studies import Comparison

OPTIONS = {"methods": ["average", "ode"], "orders": 2, "weighting": ["uniform", "dirichlet"]}
OPTIONS |= {"calibration_sizes": [24], "seeds": [3]}


def compare(directory, trainer=None, **options):
    torch.manual_seed(0)
    return (trainer or make_trainer()).compare(make_model(), make_stream(), dirpath=str(directory), **OPTIONS | options)


def without_times(comparison):
    data = comparison._as_dict()
    for cell in data["cells"]:
        cell["peak_memory"] = None
        for record in cell["report"]["merges"]:
            record["merge_seconds"] = record["gradient_seconds"] = None
    return json.dumps(data)


@pytest.mark.slow
def test_every_method_merges_every_stream_of_the_same_fine_tuned_models(tmp_path):
    comparison = compare(tmp_path)
    settings = {(cell.method, cell.order, cell.weighting) for cell in comparison.cells}
    assert len(settings) == len(comparison.cells) == 2 * 2 * 2
    accuracies = {
        (task, value)
        for cell in comparison.cells
        for task, value in zip(cell.report.tasks, cell.report.fine_tuned, strict=True)
    }
    assert len(accuracies) == 3
    assert set(comparison.joint[3]) == {"a", "b", "c"}
    loaded = Comparison.load(tmp_path)
    assert without_times(loaded) == without_times(comparison)
    assert {"cells.csv", "accuracies.csv", "comparison.txt", "radar.png"} <= {path.name for path in tmp_path.iterdir()}


MEASURED = pytest.param(ClosedFormMerge(measured=0.5), id="measured")
METHODS = ["average", "ode", "ode_paper", "trm_style", "second_moment", MEASURED]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_cell_is_the_stream_that_the_callback_merges(tmp_path, method, without_figures):
    cell = compare(tmp_path, methods={"it": method}, orders=1, weighting=["uniform"], seeds=[0], joint=False).cells[0]
    stream = make_stream()
    torch.manual_seed(0)
    merge = ContinualMergeCallback(method=method, calibration_size=24, dirpath=str(tmp_path / "run"))
    model = make_model()
    for task in stream:
        L.seed_everything(0, verbose=False)
        make_trainer(merge).fit(model, datamodule=task)
    assert cell.report.accuracy == merge.report.accuracy
    assert cell.report.fine_tuned == merge.report.fine_tuned
    assert cell.report.pretrained == merge.report.pretrained
    for ours, callbacks in zip(cell.report.merges, merge.report.merges, strict=True):
        assert ours.path.get("loss", []) == pytest.approx(callbacks.path.get("loss", []), rel=1e-5)
        assert ours.sample_gradients == callbacks.sample_gradients


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = compare(tmp_path / "whole")
    merged, original = [], ODEMerge.merge

    def failing(self, *arguments):
        if len(merged) == 3:
            raise KeyboardInterrupt
        merged.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(ODEMerge, "merge", failing)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "broken")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").rglob("*.safetensors")}
    done = len(list((tmp_path / "broken" / "cells").iterdir()))
    assert 0 < done < 8
    merged.clear()
    monkeypatch.setattr(ODEMerge, "merge", lambda self, *arguments: (merged.append(1), original(self, *arguments))[1])
    resumed = compare(tmp_path / "broken")
    assert without_times(resumed) == without_times(whole)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert len(merged) == 2 * (4 - done // 2)


@pytest.mark.slow
def test_only_what_the_final_metrics_need_is_evaluated_where_that_is_asked_for(tmp_path):
    full = compare(tmp_path, methods=["average"], orders=1, joint=False)
    part = compare(tmp_path, methods=["average"], orders=1, joint=False, full_matrix=False)
    for whole, sparse in zip(full.cells, part.cells, strict=True):
        assert torch.isfinite(sparse.report.matrix()).sum() == 3 + 2
        assert (sparse.report.acc(), sparse.report.bwt()) == (whole.report.acc(), whole.report.bwt())


@pytest.mark.slow
def test_methods_that_cannot_have_what_they_need_are_refused_before_any_merge(tmp_path):
    class Moments(MergeMethod):
        needs = (SecondMoments(),)
        merge = AverageMerge.merge

    class WithSGD(TaskClassifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    model = WithSGD(make_backbone(), mean=[0.5] * 3, std=[0.25] * 3)
    options = OPTIONS | {"methods": {"moments": Moments()}}
    with pytest.raises(ValueError, match="second moments"):
        make_trainer().compare(model, make_stream(), dirpath=str(tmp_path), **options)
    assert not (tmp_path / "cells").exists()


@pytest.mark.slow
def test_parameters_excluded_later_are_not_taken_from_what_was_merged_before(tmp_path):
    options = {"methods": ["average"], "orders": 1, "weighting": ["uniform"], "joint": False}
    whole = compare(tmp_path, **options).cells[0]
    merge = ContinualMergeCallback(exclude=["backbone.3"])
    part = compare(tmp_path, make_trainer(merge), **options).cells[0]
    fresh = compare(tmp_path / "fresh", make_trainer(ContinualMergeCallback(exclude=["backbone.3"])), **options).cells[
        0
    ]
    assert part.report.accuracy == fresh.report.accuracy
    assert part.report.accuracy != whole.report.accuracy


@pytest.mark.slow
def test_another_version_of_the_package_merges_anew_and_trains_nothing(tmp_path, monkeypatch):
    options = {"methods": ["average"], "orders": 1, "weighting": ["uniform"], "joint": False}
    compare(tmp_path, **options)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    monkeypatch.setattr("lightning_odem.version.__version__", "0.0.1")
    installed = {"lightning-odem": "0.0.1"}
    monkeypatch.setattr(
        "lightning_odem.studies.training_fingerprint.version", lambda name: installed.get(name) or version(name)
    )
    compare(tmp_path, **options)
    assert len(list((tmp_path / "cells").iterdir())) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files


def test_unknown_methods_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="Unknown merge method 'odem'"):
        compare(tmp_path, methods=["odem"])
    with pytest.raises(ValueError, match="at least one merge method"):
        compare(tmp_path, methods=[])
    assert not any(tmp_path.iterdir())


class ByError(TaskClassifier):
    """A classifier whose tasks are measured by their calibration error."""

    def task_metric(self, task):
        return MetricCollection([MulticlassCalibrationError(3), MulticlassF1Score(3)])


@pytest.mark.slow
def test_a_comparison_measures_what_the_module_says(tmp_path):
    torch.manual_seed(0)
    model = ByError(make_backbone(), mean=[0.5] * 3, std=[0.25] * 3, lr=0.05)
    options = OPTIONS | {"orders": 1, "weighting": ["uniform"], "methods": ["average"]}
    comparison = make_trainer().compare(model, make_stream(), dirpath=str(tmp_path), **options)
    assert Comparison.load(tmp_path).metric == TaskMetric("MulticlassCalibrationError", "%", False)
    report = comparison.cells[0].report
    assert report.merges[-1].further.keys() == {"a", "b", "c"}
    assert "MulticlassCalibrationError (%, lower is better)" in (tmp_path / "comparison.txt").read_text()

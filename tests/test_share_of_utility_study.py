import runpy
from pathlib import Path

import pytest
import torch
from images import make_model, make_stream, make_trainer

from lightning_odem.parameters.snapshot import load_snapshot
from lightning_odem.stream.attach import attached
from lightning_odem.stream.evaluation import score
from lightning_odem.stream.measurement import load_task_parameters
from lightning_odem.studies import Workbench
from lightning_odem.studies.finetuning import loader

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "share_of_utility_study.py"))
SHARES = [0.0, 0.25, 1.0]


def make_study_trainer():
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 2}
    return EXAMPLE["SharesTrainer"](**quiet, enable_progress_bar=False, enable_model_summary=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("shares")


@pytest.fixture(scope="module")
def comparison(directory):
    torch.manual_seed(0)
    options = {"tasks": ("c", "a"), "shares": SHARES, "calibration_size": 24, "dirpath": str(directory)}
    return make_study_trainer().utility_shares(make_model(), make_stream(), **options)


def test_the_ends_are_the_two_fine_tuned_models(comparison, directory):
    torch.manual_seed(0)
    stream = make_stream(tasks=["c", "a"])
    for task in stream:
        task.setup("fit")
    bench = Workbench(make_trainer(), make_model(), stream, directory)
    files = set(directory.rglob("*.safetensors"))
    assert len(files) == 2  # task b was not trained
    models = {name: bench.fine_tuned(0, name) for name in "ca"}
    module = bench.module(0)
    rows = []
    with attached(module):
        for model in models.values():
            load_snapshot(module, model.weights, bench.division.shared(module))
            rows.append([])
            for name in "ca":
                load_task_parameters(module, models[name].own)
                rows[-1].append(score(module, loader(stream[name], "test"), name).value)
    assert set(directory.rglob("*.safetensors")) == files
    assert rows[0] != rows[1]
    for method in ("average", "ode"):
        first, *_, last = [cell.report for cell in comparison.select(method=method)]
        assert [first.accuracy[-1], last.accuracy[-1]] == rows
        assert [first.acc(), last.acc()] == [rows[0][0], rows[1][1]]
    found = (first.merges[1].loss_after, last.merges[1].loss_after)
    assert found == pytest.approx((first.merges[1].loss_before, last.merges[1].loss_incoming), rel=1e-6)


def test_a_share_is_the_operating_time(comparison):
    for cell in comparison.cells:
        assert cell.report.weights[1] == cell.report.merges[1].t == SHARES[cell.order]


def test_curves_are_drawn_by_method_and_task(comparison, directory):
    upper, lower = EXAMPLE["figure"](comparison).axes
    drawn = {line.get_label(): line.get_ydata() for line in upper.lines}
    reports = [cell.report for cell in comparison.select(method="ode")]
    assert drawn["a, ode"] == pytest.approx([100 * report.accuracy[-1][1] for report in reports])
    assert drawn[r"$\mathrm{ACC}_w$, ode"] == pytest.approx([100 * report.acc() for report in reports])
    assert len(drawn) == 6
    assert lower.lines[1].get_ydata() == pytest.approx([report.merges[1].loss_after for report in reports])
    assert (directory / "utility_shares.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_a_row_per_method_and_share(comparison):
    columns = {column.header: list(column.cells) for column in EXAMPLE["table"](comparison).columns}
    assert columns["w of a"] == ["0.00", "0.25", "1.00"] * 2
    assert columns["loss"][:3] == ["—"] * 3
    report = comparison.select(method="ode")[1].report
    assert columns["ACC_w"][4] == f"{100 * (0.75 * report.accuracy[-1][0] + 0.25 * report.accuracy[-1][1]):.1f}"


def test_earlier_tasks_share_what_the_last_one_leaves(tmp_path):
    torch.manual_seed(0)
    options = {"tasks": ["c", "b", "a"], "shares": [0.5, 1.0], "methods": ["average"], "dirpath": str(tmp_path)}
    comparison = make_study_trainer().utility_shares(make_model(), make_stream(), **options, calibration_size=24)
    half, whole = (cell.report for cell in comparison.cells)
    assert half.weights == [0.25, 0.25, 0.5]
    assert [merge.t for merge in half.merges] == [1.0, 0.5, 0.5]
    assert whole.merges[-1].t == 1.0
    assert whole.accuracy[-1][-1] == whole.fine_tuned[-1]
    upper, _ = EXAMPLE["figure"](comparison).axes
    drawn = {line.get_label(): line.get_ydata() for line in upper.lines}
    assert drawn["mean of the 2 others, average"] == pytest.approx(
        [100 * sum(report.accuracy[-1][:2]) / 2 for report in (half, whole)]
    )


def test_a_single_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two tasks at least, got 1"):
        make_study_trainer().utility_shares(make_model(), make_stream(), tasks=["a"], dirpath=str(tmp_path))

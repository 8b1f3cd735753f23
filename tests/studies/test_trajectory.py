import csv
import json
import shutil
from dataclasses import replace
from statistics import fmean

import pytest
import torch
import yaml
from images import make_model, make_stream, make_trainer
from torch.utils.data import default_collate
from torchmetrics.classification import MulticlassF1Score

from lightning_odem import CalibrationOptions, ContinualMergeCallback, TaskClassifier
from lightning_odem.cli.command_line import main
from lightning_odem.methods import AverageMerge, PaperODEMerge
from lightning_odem.studies import Workbench, trajectory
from lightning_odem.studies.trajectory import LINE, PairPath
from lightning_odem.studies.trajectory_report import plot_trajectory, render_trajectory, save_trajectory

OPTIONS = {"points": 6, "calibration_size": 24, "seed": 3}


def study(directory, stream=None, loss="labels", **options):
    torch.manual_seed(0)
    trainer = make_trainer(ContinualMergeCallback(calibration=CalibrationOptions(loss=loss)))
    return trainer.trajectory(make_model(), stream or make_stream(), dirpath=str(directory), **OPTIONS | options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("trajectory")


@pytest.fixture(scope="module")
def paths(directory):
    return study(directory)


def test_each_task_is_paired_with_the_next_on_both_paths(paths):
    assert [(path.pair, path.method) for path in paths] == [
        (("a", "b"), "ode_paper"),
        (("a", "b"), LINE),
        (("b", "c"), "ode_paper"),
        (("b", "c"), LINE),
    ]
    assert all(path.t == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] for path in paths)


def test_accuracies_are_those_of_models_merged_and_measured_by_themselves(paths, directory):
    facts = {}
    for file in (directory / "fine_tuned").glob("*.json"):
        data = json.loads(file.read_text())
        facts[data["task"]] = data["fine_tuned"]["test"]
    for path in paths:
        start, end = path.pair
        assert path.accuracy[start][0] == facts[start]
        assert path.accuracy[end][-1] == facts[end]
    assert facts["a"] > 0.5


def test_the_straight_line_is_measured_at_interpolated_weights(paths, directory):
    from safetensors.torch import load_file

    stream = make_stream()
    for task in stream:
        task.setup("fit")
    files = {name: load_file(next((directory / "fine_tuned").glob(f"{name}-*.safetensors"))) for name in "ab"}
    model = make_model()
    for tensors in files.values():
        own = {name.removeprefix("own/"): value for name, value in tensors.items() if name.startswith("own/")}
        model.on_load_checkpoint({"state_dict": own})
        model.load_state_dict(own, strict=False)
    model.eval()
    for index, t in enumerate(paths[1].t):
        weights = {
            name.removeprefix("weights/"): value.lerp(files["b"][name], t)
            for name, value in files["a"].items()
            if name.startswith("weights/")
        }
        model.load_state_dict(weights, strict=False)
        for name in "ab":
            correct = total = 0
            for images, labels in stream[name].test_dataloader():
                with torch.no_grad():
                    scores, _ = model.prediction_step((images, labels), name)
                correct += (scores.argmax(1) == labels).sum().item()
                total += len(labels)
            assert paths[1].accuracy[name][index] == correct / total


def test_the_two_paths_have_the_same_ends(paths):
    for flow, line in (paths[:2], paths[2:]):
        for index in (0, -1):
            assert flow.loss[index] == pytest.approx(line.loss[index], rel=1e-6)
            assert [a[index] for a in flow.accuracy.values()] == [a[index] for a in line.accuracy.values()]


def test_a_second_run_integrates_nothing(paths, directory, monkeypatch):
    monkeypatch.setattr(PaperODEMerge, "merge", lambda *_: pytest.fail("integrated again"))
    assert study(directory) == paths


def test_an_interrupted_study_goes_on_with_the_next_pair(paths, directory, tmp_path, monkeypatch):
    done, original = [], PaperODEMerge.merge

    def failing(self, *arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(PaperODEMerge, "merge", failing)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path)
    assert len(list((tmp_path / "trajectory").iterdir())) == 1
    done.clear()
    assert study(tmp_path) == paths
    assert len(done) == 1


def test_another_setting_is_another_result(paths, directory):
    others = study(directory, pairs=[("a", "b")], points=3)
    assert len(others[0].t) == 3
    assert others[0].accuracy["a"][0] == paths[0].accuracy["a"][0]


def test_batch_norm_models_end_exactly_in_the_fine_tuned_models(tmp_path):
    backbone = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 6)
    )
    model = TaskClassifier(backbone, mean=[0.5] * 3, std=[0.25] * 3, lr=0.05)
    trainer = make_trainer(ContinualMergeCallback(batch_norm="average"))
    flow, line = trainer.trajectory(model, make_stream(2), points=2, calibration_size=24, dirpath=str(tmp_path))
    assert flow.accuracy == line.accuracy
    for file in (tmp_path / "fine_tuned").glob("*.json"):
        data = json.loads(file.read_text())
        assert flow.accuracy[data["task"]]["ab".index(data["task"])] == data["fine_tuned"]["test"]


def kl_divergence(p, q):
    return (p * (p / q).log()).sum(1).mean().item()


def entropy(p):
    return -(p * p.log()).sum(1).mean().item()


def make_bench(directory, model=None):
    torch.manual_seed(0)
    return Workbench(make_trainer(), model or make_model(), make_stream(), directory)


def probabilities(bench, model, own, task):
    """Of the model fine-tuned on a task, with what another keeps for itself, on all training samples of a third."""
    dataset = bench.stream[task].calibration_dataset()
    images, _ = default_collate([dataset[index] for index in range(len(dataset))])
    module = bench.module(3).eval()
    module.load_state_dict(bench.fine_tuned(3, model).weights | bench.fine_tuned(3, own).own, strict=False)
    with torch.no_grad():
        return module(images, task).double().softmax(1)


def test_losses_without_labels_are_those_written_out_at_both_ends(paths, directory):
    bench, options = make_bench(directory), {"pairs": [("a", "b")], "calibration_size": 72}
    p = {(model, task): probabilities(bench, model, model, task) for model in "ab" for task in "ab"}
    # A model's own task adds nothing to the divergence.
    ends = [kl_divergence(p["b", "b"], p["a", "b"]) / 2, kl_divergence(p["a", "a"], p["b", "a"]) / 2]
    for path in study(directory, loss="logits", **options):
        assert [path.loss[0], path.loss[-1]] == pytest.approx(ends, rel=1e-4)
    ends = [(entropy(p[model, "a"]) + entropy(p[model, "b"])) / 2 for model in "ab"]
    for path in study(directory, loss="entropy", **options):
        assert [path.loss[0], path.loss[-1]] == pytest.approx(ends, rel=1e-4)


def test_logits_of_the_start_are_given_with_what_its_task_keeps_for_itself(tmp_path):
    model, trainer = make_model(), make_trainer(ContinualMergeCallback(calibration=CalibrationOptions(loss="logits")))
    model.task_specific = ("heads", "backbone.1")
    options = OPTIONS | {"pairs": [("a", "b")], "calibration_size": 72}
    flow, _ = trainer.trajectory(model, make_stream(), dirpath=str(tmp_path), **options)
    bench = make_bench(tmp_path, model)
    # While the loss is measured, the layer that is not merged is that of the path's end.
    own_task = kl_divergence(probabilities(bench, "a", "a", "a"), probabilities(bench, "a", "b", "a"))
    other_task = kl_divergence(probabilities(bench, "b", "b", "b"), probabilities(bench, "a", "b", "b"))
    assert own_task > 0.01
    assert flow.loss[0] == pytest.approx((own_task + other_task) / 2, rel=1e-4)


def test_labels_of_the_calibration_samples_are_not_read_without_need(paths, directory, tmp_path, monkeypatch):
    options, original = {"loss": "logits", "pairs": [("a", "b")]}, trajectory.draw_by_index

    def draw_images(dataset, *arguments, **options):
        return original([image for image, _ in dataset], *arguments, **options)

    labelled = study(directory, **options)
    shutil.copytree(directory / "fine_tuned", tmp_path / "fine_tuned")
    monkeypatch.setattr(trajectory, "draw_by_index", draw_images)
    assert study(tmp_path, **options) == labelled


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairs": [("a", "z")]}, ValueError, r"two tasks of a, b, c; got \[\['a', 'z'\]\]"),
        ({"pairs": [("a", "a")]}, ValueError, r"got \[\['a', 'a'\]\]"),
        ({"pairs": []}, ValueError, "got none"),
        ({"points": 12}, ValueError, "12 points"),
        ({"method": AverageMerge()}, TypeError, "not that of AverageMerge"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_training(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        study(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def made_up(points=11):
    t = [index / (points - 1) for index in range(points)]
    first = [0.9 - 0.5 * x**2 for x in t]
    second = [0.2 + 0.7 * x**0.5 for x in t]
    return [
        PairPath(method, t, [1 - x * (1 - x) for x in t], {f"task {a}": first, f"task {b}": second})
        for a, b in ("ab", "bc")
        for method in ("ode", LINE)
    ]


def test_the_table_marks_the_first_best_mean_of_each_path():
    path = PairPath("ode", [0.0, 0.5, 1.0], [1.0] * 3, {"a": [0.9, 0.7, 0.1], "b": [0.1, 0.3, 0.9]})
    lines = render_trajectory([path], width=80).splitlines()
    assert lines[4].split() == ["a", "→", "b", "a", "90.0", "70.0", "10.0"]
    assert lines[6].split() == ["mean", "*50.0", "50.0", "50.0"]


def test_a_narrow_table_loses_no_column():
    text = render_trajectory(made_up(), width=50)
    assert max(map(len, text.splitlines())) <= 50
    tables = text.split("Accuracy (%)")[1:]
    assert [
        sum(table.count(f" {t / 10:.1f} ") + table.count(f" {t / 10:.1f}\n") for t in range(11)) for table in tables
    ]
    for table in tables:
        headers = [line.split()[2:] for line in table.splitlines() if line.startswith("pair")]
        assert [float(t) for header in headers for t in header] == [t / 10 for t in range(11)]


def test_files_hold_what_was_measured(tmp_path):
    paths = made_up()
    files = save_trajectory(paths, tmp_path)
    assert sorted(file.name for file in files) == [f"trajectory.{kind}" for kind in ("csv", "json", "png", "txt")]
    assert [PairPath(**data) for data in json.loads(files[0].read_text())] == paths
    rows = list(csv.DictReader(files[1].open()))
    assert len(rows) == 4 * 11
    assert (rows[3]["start"], rows[3]["end"], rows[3]["method"]) == ("task a", "task b", "ode")
    accuracies = float(rows[3]["accuracy_start"]), float(rows[3]["accuracy_end"])
    assert float(rows[3]["mean"]) == pytest.approx(fmean(accuracies))
    assert float(rows[3]["t"]) == 0.3


def test_the_figure_has_accuracy_and_loss_of_every_pair():
    axes = [part for part in plot_trajectory(made_up()).axes if part.lines]
    assert len(axes) == 4
    assert axes[0].lines[0].get_ydata().tolist() == pytest.approx([100 * mean for mean in made_up()[0].mean])
    assert {axes.get_title() for axes in axes} == {"task a → task b", "task b → task c", ""}


def test_pairs_that_do_not_fill_the_last_row_leave_no_empty_frame():
    paths = [path for first in "abcde" for path in renamed(first)]
    axes = plot_trajectory(paths).axes
    assert len(axes) == 2 * 2 * 3
    assert [part.axison for part in axes] == [bool(part.lines) for part in axes]
    assert sum(part.axison for part in axes) == 10


def renamed(first):
    return [replace(path, accuracy=dict(zip((first, "z"), path.accuracy.values(), strict=True))) for path in made_up()]


@pytest.mark.parametrize(("command", "points"), [("trajectory", 11), ("schedule", 21)])
def test_the_command_line_has_the_study(command, points, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--model=TaskClassifier", "--model.backbone=test_vit", "--data=DigitsStream", "--print_config"])
    assert end.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["points"], config["method"], config["dirpath"]) == (points, "ode_paper", "comparison")


def test_of_means_that_differ_by_rounding_the_first_is_best():
    path = PairPath("ode", [0.0, 1.0], [1.0] * 2, {"a": [0.7, 0.4], "b": [0.1, 0.4]})
    assert path.mean[0] < path.mean[1]
    assert path.best == 0


def test_tasks_with_another_metric_are_refused(tmp_path):
    model = make_model()
    model.task_metric = lambda task: MulticlassF1Score(3)
    with pytest.raises(ValueError, match="compares accuracies; task 'a' is measured by MulticlassF1Score"):
        make_trainer().trajectory(model, make_stream(), dirpath=str(tmp_path), **OPTIONS)

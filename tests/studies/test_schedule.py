import csv
import json
import math
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch
from images import make_model, make_stream, make_trainer
from scipy.stats import spearmanr

from lightning_odem import CalibrationOptions, ContinualMergeCallback
from lightning_odem.methods import PaperODEMerge
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.studies import Workbench, schedule
from lightning_odem.studies.schedule import OperatingPoint, ScheduleStudy, _Candidates
from lightning_odem.studies.schedule_report import plot_schedule, render_schedule, save_schedule

OPTIONS = {"orders": 2, "points": 5, "calibration_size": 24, "seed": 3}


def trainer_of(loss):
    torch.manual_seed(0)
    return make_trainer(ContinualMergeCallback(calibration=CalibrationOptions(loss=loss)))


def study(directory, number=3, loss="labels", **options):
    return trainer_of(loss).schedule(make_model(), make_stream(number), dirpath=str(directory), **OPTIONS | options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("schedule")


@pytest.fixture(scope="module")
def studies(directory):
    return study(directory)


def test_every_merge_but_the_first_has_its_candidates(studies):
    assert [study.order for study in studies] == [0, 1]
    assert studies[0].tasks == ["a", "b", "c"] != studies[1].tasks
    for study in studies:
        assert [(merge.k, merge.task) for merge in study.merges] == [(2, study.tasks[1]), (3, study.tasks[2])]
        assert all(merge.t == [0.0, 0.25, 0.5, 0.75, 1.0] for merge in study.merges)


def test_the_schedule_is_the_stream_that_compare_merges(studies, directory):
    torch.manual_seed(0)
    comparison = make_trainer().compare(
        make_model(),
        make_stream(),
        methods=["ode_paper"],
        orders=2,
        seeds=[3],
        calibration_sizes=[24],
        joint=False,
        dirpath=str(directory),
    )
    for study, cell in zip(studies, comparison.cells, strict=True):
        assert study.tasks == cell.report.tasks
        assert [merge.test_schedule for merge in study.merges] == [fmean(row) for row in cell.report.accuracy[1:]]


def test_candidates_are_measured_on_validation_data_and_the_chosen_one_on_test_data(studies, directory):
    # The ends of the first merge's path are the first two fine-tuned models.
    torch.manual_seed(0)
    bench = Workbench(make_trainer(), make_model(), make_stream(), directory)
    for task in bench.stream:
        task.setup("fit")
    first, second, _ = studies[0].tasks
    merge = studies[0].merges[0]
    module = bench.module(3).eval()
    found = {}
    for t, name in ((0.0, first), (1.0, second)):
        module.load_state_dict(bench.fine_tuned(3, name).weights, strict=False)
        for split in ("val", "test"):
            found[split, t] = fmean(by_hand(module, bench.stream[task], split) for task in (first, second))
    assert merge.validation[0] == pytest.approx(found["val", 0.0])
    assert merge.validation[-1] == pytest.approx(found["val", 1.0])
    if merge.t_best in (0.0, 1.0):
        assert merge.test_best == pytest.approx(found["test", merge.t_best])


def by_hand(module, task, split):
    loader = task.val_dataloader() if split == "val" else task.test_dataloader()
    correct = []
    for images, labels in loader:
        with torch.no_grad():
            scores, _ = module.prediction_step((images, labels), task.task_name)
        correct.append(scores.argmax(1) == labels)
    return torch.cat(correct).double().mean().item()


def test_the_candidate_at_the_scheduled_time_is_the_scheduled_model(directory):
    # k = 2: t = 1 / 2 is among the candidates, and chosen if there is nothing else but the ends.
    merges = [study.merges[0] for study in study(directory, points=3)]
    assert any(merge.t_best == 0.5 for merge in merges)
    assert all(merge.gain == 0.0 for merge in merges if merge.t_best == 0.5)


def test_the_stream_goes_on_with_the_model_that_follow_names(tmp_path):
    # Of two candidates, the fine-tuned models, one is chosen: the next path starts there.
    scheduled, best = (study(tmp_path, points=2, orders=1, follow=follow)[0] for follow in ("schedule", "best"))
    assert scheduled.merges[0] == best.merges[0]
    assert best.merges[0].t_best in (0.0, 1.0)
    torch.manual_seed(0)
    bench = Workbench(make_trainer(), make_model(), make_stream(), tmp_path)
    for task in bench.stream:
        task.setup("fit")
    module = bench.module(3).eval()
    chosen = best.tasks[int(best.merges[0].t_best)]
    module.load_state_dict(bench.fine_tuned(3, chosen).weights, strict=False)
    expected = fmean(by_hand(module, task, "val") for task in bench.stream)
    assert best.merges[1].validation[0] == pytest.approx(expected)
    assert scheduled.merges[1].validation[0] != pytest.approx(expected)


@pytest.mark.parametrize("loss", ["logits", "entropy"])
def test_candidates_lie_on_the_path_of_the_loss_chosen(loss, studies, directory, monkeypatch):
    records, original = [], schedule.follow_path

    def recording(*arguments, **options):
        records.append(original(*arguments, **options))

    monkeypatch.setattr(schedule, "follow_path", recording)
    found = study(directory, orders=1, loss=loss)[0]
    assert len(records) == 2
    pair = tuple(found.tasks[:2])
    options = {name: OPTIONS[name] for name in ("points", "calibration_size", "seed")}
    flow, _ = trainer_of(loss).trajectory(make_model(), make_stream(), pairs=[pair], dirpath=str(directory), **options)
    assert records[0].path["loss"][:: records[0].steps // 4] == pytest.approx(flow.loss, rel=1e-6)


def test_a_merge_costs_one_path_and_the_scheduled_merge(tmp_path, monkeypatch):
    times, original = [], PaperODEMerge.merge

    def counting(self, merged, incoming, t, context):
        times.append(t)
        return original(self, merged, incoming, t, context)

    monkeypatch.setattr(PaperODEMerge, "merge", counting)
    study(tmp_path, orders=1, points=21)
    assert times == pytest.approx([1.0, 1 / 2, 1.0, 1 / 3])


def test_a_second_run_merges_nothing(studies, directory, monkeypatch):
    monkeypatch.setattr(PaperODEMerge, "merge", lambda *_: pytest.fail("merged again"))
    assert study(directory) == studies


def test_an_interrupted_study_goes_on_with_the_next_order(studies, tmp_path, monkeypatch):
    done, original = [], PaperODEMerge.merge

    def failing(self, *arguments):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(PaperODEMerge, "merge", failing)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path)
    assert len(list((tmp_path / "schedule").iterdir())) == 1
    done.clear()
    assert study(tmp_path) == studies
    assert len(done) == 4


def test_a_stream_of_one_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a merge needs two at least"):
        study(tmp_path, number=1, orders=1)


def made_up(*orders):
    t = [index / 20 for index in range(21)]
    return [
        ScheduleStudy(
            order,
            [f"task {k}" for k in range(len(best) + 1)],
            "schedule",
            [
                OperatingPoint(k, f"task {k}", t, [float(x == time) for x in t], 0.8 + 0.01 * k, 0.8)
                for k, time in enumerate(best, start=2)
            ],
        )
        for order, best in enumerate(orders)
    ]


def test_the_best_time_is_the_smallest_of_equally_good_ones():
    merge = OperatingPoint(2, "b", [0.0, 0.25, 0.5], [0.5, 0.75, 0.75], 0.7, 0.6)
    assert merge.t_best == 0.25


def test_spearman_agrees_with_scipy_on_ties():
    best = [0.55, 0.3, 0.3, 0.35, 0.1, 0.2, 0.1]
    expected = spearmanr([1 - t for t in best], [(k - 1) / k for k in range(2, 9)]).statistic
    assert made_up(best)[0].spearman == pytest.approx(expected, abs=1e-5)
    assert 0.5 < expected < 1


def test_spearman_is_undefined_for_one_merge_or_equal_times():
    one, equal = made_up([0.5], [0.3, 0.3, 0.3])
    assert math.isnan(one.spearman)
    assert math.isnan(equal.spearman)


def test_the_table_has_means_and_deviations_over_orders():
    lines = render_schedule(made_up([0.5, 0.3, 0.2], [0.6, 0.3, 0.3]), width=120).splitlines()
    assert lines[4].split() == [
        "2",
        "0.500",
        "0.55",
        "±",
        "0.07",
        "82.0",
        "±",
        "0.0",
        "80.0",
        "±",
        "0.0",
        "+2.00",
        "±",
        "0.00",
    ]
    assert "Spearman correlation of 1 - t* and (k - 1)/k: 0.933 ± 0.095" in lines


def test_undefined_correlations_are_counted_not_averaged():
    text = render_schedule(made_up([0.3, 0.3], [0.6, 0.3]), width=120)
    assert "(k - 1)/k: 1.000 (undefined in 1 of 2 orders)" in text


def test_files_hold_what_was_measured(tmp_path):
    studies = made_up([0.5, 0.3, 0.2], [0.3, 0.3, 0.3])
    files = save_schedule(studies, tmp_path)
    assert {Path(file).suffix for file in files} == {".json", ".csv", ".txt", ".png"}
    data = json.loads(files[0].read_text())
    assert data[0]["spearman"] == pytest.approx(1.0, abs=1e-5)
    assert data[1]["spearman"] is None
    assert data[0]["merges"][1]["validation"] == studies[0].merges[1].validation
    rows = list(csv.DictReader(files[1].open()))
    assert len(rows) == 6
    assert (rows[4]["order"], rows[4]["k"], rows[4]["t_best"]) == ("1", "3", "0.3")
    assert float(rows[4]["gain"]) == pytest.approx(0.03)


def test_the_figure_has_every_order_their_mean_and_the_schedule():
    lines = plot_schedule(made_up([0.5, 0.3], [0.6, 0.2])).axes[0].lines
    assert [line.get_ydata().tolist() for line in lines[:2]] == [[0.5, 0.3], [0.6, 0.2]]
    assert lines[2].get_ydata().tolist() == pytest.approx([0.55, 0.25])
    assert lines[3].get_ydata().tolist() == pytest.approx([1 / 2, 1 / 3])


def test_of_means_that_differ_by_rounding_the_smallest_time_counts():
    """0.7 and 0.1 have the mean of 0.4 and 0.4, but not in binary."""
    means = [fmean([0.7, 0.1]), fmean([0.4, 0.4])]
    assert means[0] < means[1]
    assert OperatingPoint(2, "b", [0.0, 0.5], means, 0.7, 0.6).t_best == 0.0
    net = torch.nn.Linear(1, 1, bias=False)
    candidates = _Candidates(partial(means.pop, 0))
    for t in (0.0, 0.5):
        torch.nn.init.constant_(net.weight, t)
        candidates.visit(t, partial(take_snapshot, net))
    assert candidates.best["weight"].item() == 0.0

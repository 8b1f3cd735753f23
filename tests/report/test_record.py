import json
import math

import pytest
from torch import nan, tensor
from torch.testing import assert_close

from lightning_odem.metrics import ACCURACY, TaskMetric
from lightning_odem.report import MergeRecord, RemovalRecord, StreamReport


@pytest.fixture
def report() -> StreamReport:
    path = {"t": [0.0, 0.25], "loss": [1.0, 0.5], "alignment": [-1.0], "gamma": [1.0], "alignment_ratio": [0.5]}
    return StreamReport(
        tasks=["a", "b", "c"],
        weights=[2.0, 1.0, 1.0],
        accuracy=[[0.9], [0.8, 0.7], [0.6, 0.75, 0.9]],
        pretrained=[0.1, 0.2, 0.1],
        fine_tuned=[0.9, nan, 0.95],
        before_training=[nan, 0.3, 0.5],
        merges=[
            MergeRecord("a", 1.0, "odem", loss_before=nan),
            MergeRecord("b", 1 / 3, "odem", path, loss_before=1.0, calibration={"a": 3, "b": 2}),
            MergeRecord("c", 0.25, "odem", checkpoint="merged-3.ckpt"),
        ],
    )


def test_matrix_is_nan_above_the_diagonal(report: StreamReport) -> None:
    expected = tensor([[0.9, nan, nan], [0.8, 0.7, nan], [0.6, 0.75, 0.9]]).double()
    assert_close(report.matrix(), expected, equal_nan=True, rtol=0, atol=1e-7)


def test_acc_weighs_the_tasks_merged_so_far(report: StreamReport) -> None:
    assert report.acc(0) == pytest.approx(0.9)
    assert report.acc(1) == pytest.approx((2 * 0.8 + 0.7) / 3)
    assert report.acc() == pytest.approx((2 * 0.6 + 0.75 + 0.9) / 4)


def test_bwt_compares_earlier_tasks_with_their_own_merge(report: StreamReport) -> None:
    assert report.bwt(1) == pytest.approx(0.8 - 0.9)
    assert report.bwt() == pytest.approx((2 * (0.6 - 0.9) + (0.75 - 0.7)) / 3)


def test_forgetting_compares_earlier_tasks_with_their_best_before(report: StreamReport) -> None:
    assert report.forgetting() == pytest.approx((2 * (0.9 - 0.6) + (0.7 - 0.75)) / 3)


def test_fwt_compares_the_model_before_training_with_the_base_model(report: StreamReport) -> None:
    assert report.fwt(1) == pytest.approx(0.3 - 0.2)
    assert report.fwt() == pytest.approx(((0.3 - 0.2) + (0.5 - 0.1)) / 2)


@pytest.mark.parametrize("name", ["bwt", "forgetting", "fwt"])
def test_transfer_is_nan_before_the_second_task(report: StreamReport, name: str) -> None:
    assert math.isnan(getattr(report, name)(0))


def test_acc_is_nan_while_all_tasks_have_weight_zero() -> None:
    report = StreamReport(["a", "b"], [0.0, 1.0], [[0.5], [0.5, 0.75]], [nan, nan], [nan, nan], [nan, nan])
    assert math.isnan(report.acc(0))
    assert report.acc(1) == 0.75


def test_json_round_trip_gives_the_same_report(report: StreamReport, tmp_path) -> None:
    loaded = StreamReport.load(report.save(tmp_path / "new" / "report.json"))
    assert repr(loaded) == repr(report)  # NaN equals itself in text only


def test_file_holds_null_for_nan_and_the_summary_of_every_merge(report: StreamReport, tmp_path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(report.save(tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert data["fine_tuned"] == [0.9, None, 0.95]
    assert data["merges"][0]["loss_before"] is None
    assert data["merges"][0]["checkpoint"] is None
    assert data["acc"] == [report.acc(k) for k in range(3)]
    assert data["bwt"] == [None, report.bwt(1), report.bwt(2)]


def test_missing_checkpoint_stays_none(report: StreamReport, tmp_path) -> None:
    loaded = StreamReport.load(report.save(tmp_path / "report.json"))
    assert [record.checkpoint for record in loaded.merges] == [None, None, "merged-3.ckpt"]


def test_save_leaves_only_the_report(report: StreamReport, tmp_path) -> None:
    report.save(tmp_path / "report.json")
    report.save(tmp_path / "report.json")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_failed_write_keeps_the_old_file_and_leaves_no_draft(report: StreamReport, tmp_path) -> None:
    resource = pytest.importorskip("resource")
    path = report.save(tmp_path / "report.json")
    before = path.read_bytes()
    report.tasks[0] = "changed"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # the disk is full half-way
    try:
        with pytest.raises(OSError, match="large"):
            report.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("garbage", ["", "{", "[1, 2]", "null", "{}", '{"tasks": []}', "\x00\xff"])
def test_load_of_garbage_names_the_file(tmp_path, garbage: str) -> None:
    path = tmp_path / "garbage.json"
    path.write_text(garbage, encoding="latin-1")
    with pytest.raises(ValueError, match=r"garbage\.json is not a merge report"):
        StreamReport.load(path)


def test_load_refuses_an_incomplete_accuracy_matrix(report: StreamReport, tmp_path) -> None:
    report.accuracy.pop()
    with pytest.raises(ValueError, match=r"report\.json is damaged: 3 tasks, but accuracy rows of lengths \[1, 2\]"):
        StreamReport.load(report.save(tmp_path / "report.json"))


def test_load_of_a_missing_file_is_a_file_not_found_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        StreamReport.load(tmp_path / "report.json")


def test_without_a_task_its_row_and_column_are_gone_and_a_note_is_left(report: StreamReport, tmp_path) -> None:
    left = report.without("b")
    assert (left.tasks, left.weights) == (["a", "c"], [2.0, 1.0])
    assert left.accuracy == [[0.9], [0.6, 0.9]]
    assert left.fine_tuned == [0.9, 0.95]
    assert [record.task for record in left.merges] == ["a", "c"]
    assert left.removed == [RemovalRecord("b", 1.0, ["c"])]
    assert report.tasks == ["a", "b", "c"]
    assert repr(StreamReport.load(left.save(tmp_path / "report.json"))) == repr(left)


def test_a_note_names_tasks_that_are_there_as_they_were(report: StreamReport) -> None:
    left = report.without("a").without("c")
    assert left.removed == [RemovalRecord("a", 2.0, ["b"]), RemovalRecord("c", 1.0, [])]
    again = left.with_merge(
        MergeRecord("c", 0.5, "odem"),
        weight=1.0,
        accuracy=[0.5, 0.5],
        pretrained=0.1,
        fine_tuned=0.9,
        before_training=nan,
    )
    assert (again.tasks, again.removed) == (["b", "c"], left.removed)


def test_a_report_of_an_earlier_version_has_no_removals(report: StreamReport, tmp_path) -> None:
    path = report.save(tmp_path / "report.json")
    data = json.loads(path.read_text())
    del data["removed"]
    path.write_text(json.dumps(data))
    assert StreamReport.load(path).removed == []


PERPLEXITY, R2 = TaskMetric("Perplexity", "", False), TaskMetric("R2Score", "")


def test_metrics_and_further_numbers_survive_the_file(report: StreamReport, tmp_path) -> None:
    report.metrics = {"b": PERPLEXITY}
    report.merges[1].further = {"b": {"loss": 2.0, "undefined": nan}}
    loaded = StreamReport.load(report.save(tmp_path / "report.json"))
    assert repr(loaded) == repr(report)
    assert loaded.metric_of("b") == PERPLEXITY
    assert loaded.metric_of("a") == ACCURACY


def test_a_report_of_an_earlier_version_is_one_of_accuracies(report: StreamReport, tmp_path) -> None:
    path = report.save(tmp_path / "report.json")
    data = json.loads(path.read_text())
    del data["metrics"]
    for merge in data["merges"]:
        del merge["further"]
    path.write_text(json.dumps(data))
    assert repr(StreamReport.load(path)) == repr(report)
    assert report.metric() == ACCURACY


def test_where_lower_is_better_negative_bwt_means_forgotten(report: StreamReport) -> None:
    before = report.acc(), report.bwt(), report.forgetting(), report.fwt()
    report.metrics = dict.fromkeys("abc", PERPLEXITY)
    assert report.acc() == before[0]
    assert report.bwt() == pytest.approx(-before[1])
    assert report.fwt() == pytest.approx(-before[3])
    assert report.forgetting() == pytest.approx((2 * (0.6 - 0.8) + (0.75 - 0.7)) / 3)


def test_means_over_unlike_metrics_are_nan(report: StreamReport) -> None:
    report.metrics = {"c": R2}
    assert report.acc(1) == pytest.approx((2 * 0.8 + 0.7) / 3)
    assert [math.isnan(value) for value in (report.acc(), report.bwt(), report.forgetting(), report.fwt())] == [
        True
    ] * 4
    assert math.isnan(report.weighted_accuracy(report.pretrained))
    assert (report.metric(2), report.metric()) == (ACCURACY, None)


def test_without_a_task_its_metric_is_gone_too(report: StreamReport) -> None:
    report.metrics = {"b": R2, "c": R2}
    report.merges[2].further = {"b": {"error": 1.0}, "c": {"error": 2.0}}
    left = report.without("b")
    assert left.metrics == {"c": R2}
    assert left.merges[1].further == {"c": {"error": 2.0}}
    assert report.merges[2].further.keys() == {"b", "c"}


def test_only_tasks_with_a_score_are_measured(report: StreamReport) -> None:
    report.accuracy = [[nan], [nan, 0.5], [nan, 0.5, nan]]
    assert report.measured() == {"b": ACCURACY}

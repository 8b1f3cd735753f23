import json
import math

from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.report.lines import lines, record_line, score_line

UNMEASURED = dict.fromkeys(("pretrained", "fine_tuned", "before_training"), math.nan)


def grown(size, counts=True):
    report = StreamReport()
    for index in range(size):
        calibration = {f"t{task}": 1 for task in range(index + 1)} if counts else {}
        record = MergeRecord(f"t{index}", 1 / (index + 1), "ode", {"t": [0.0, 0.5]}, calibration=calibration)
        record.checkpoint = f"{index}.ckpt"
        accuracy = [math.nan] * index + [0.5]
        report = report.with_merge(record, weight=1.0, accuracy=accuracy, **UNMEASURED).keeping_checkpoints(3)
        report.stored()
    return report


def written(report, path):
    return report.save(path).read_bytes(), report.stored()


def test_a_report_with_known_lines_is_written_as_one_without(tmp_path):
    report = grown(30)
    afresh = StreamReport(**{name: value for name, value in vars(report).items() if not name.startswith("_")})
    assert written(report, tmp_path / "a.json") == written(afresh, tmp_path / "b.json")


def test_what_is_changed_in_the_last_record_is_written(tmp_path):
    report = grown(3)
    report.stored()
    report.merges[-1].checkpoint = "other.ckpt"
    assert json.loads(report.save(tmp_path / "report.json").read_text())["merges"][-1]["checkpoint"] == "other.ckpt"
    assert json.loads(report.stored()["merges"][-1])["checkpoint"] == "other.ckpt"


def test_a_line_is_written_once_for_each_merge():
    count = 0

    def write(scores):
        nonlocal count
        count += 1
        return score_line(scores)

    rows, known = [], ()
    for size in range(1, 11):
        rows.append([0.5] * size)
        known = lines(rows, known, write)
    assert count == 10
    assert [line.public for line in known] == [json.dumps(row) for row in rows]


def test_what_was_not_measured_is_null_for_readers_and_nothing_in_the_state():
    scores, record = score_line([math.nan, 0.5, math.nan]), record_line(MergeRecord("a", 0.5, "ode"))
    assert scores.public == "[null, 0.5, null]"
    assert repr(json.loads(scores.stored)) == "[0.5, nan]"
    assert score_line([math.nan]).public == "[]"
    assert json.loads(record.public)["loss_before"] is None
    assert json.loads(record.stored) == {"task": "a", "t": 0.5, "method": "ode"}


def test_the_samples_per_task_are_those_of_the_last_twenty_merges():
    report = grown(23)
    assert [bool(record.calibration) for record in report.merges] == [False] * 3 + [True] * 20
    assert report.merges[-1].calibration.keys() == set(report.tasks)


def test_the_state_of_a_stream_with_samples_grows_by_the_same_at_each_task():
    sizes = [len(json.dumps(grown(size).stored())) for size in (50, 100, 150)]
    assert sizes[2] - sizes[1] < 1.1 * (sizes[1] - sizes[0])

import shutil

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toy import Classifier, Task, fit, make_trainer

from lightning_odem import ContinualMergeCallback
from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.state import StreamState

nan = float("nan")


def state_of(*tasks, dirpath=None, started=None):
    report = StreamReport(
        tasks=list(tasks),
        weights=[1.0] * len(tasks),
        accuracy=[[0.5] * (k + 1) for k in range(len(tasks))],
        pretrained=[0.1] * len(tasks),
        fine_tuned=[0.9] * len(tasks),
        before_training=[nan] * len(tasks),
        merges=[MergeRecord(task, t=1 / (k + 1), method="average") for k, task in enumerate(tasks)],
    )
    return StreamState(CalibrationBuffer(4), report=report, dirpath=dirpath, started=started or {})


@pytest.fixture
def trainer(tmp_path):
    return make_trainer(default_root_dir=tmp_path)


def claimed(trainer, state, dirpath=None):
    directory = RunDirectory(dirpath)
    directory.claim(trainer, state)
    return directory


def test_streams_without_a_directory_of_their_own_get_the_next_free_version(trainer, tmp_path):
    for expected in ("version_0", "version_1", "version_2"):
        state = state_of()
        assert claimed(trainer, state).path == tmp_path / "merge_runs" / expected
        assert state.dirpath == str(tmp_path / "merge_runs" / expected)


def test_versions_count_on_from_the_highest_and_other_entries_do_not_matter(trainer, tmp_path):
    for name in ("version_7", "version_x", "version_", "notes"):
        (tmp_path / "merge_runs" / name).mkdir(parents=True)
    assert claimed(trainer, state_of()).path.name == "version_8"


def test_the_directory_asked_for_is_taken_and_holds_nothing_but_a_lock_before_there_is_something_to_write(
    trainer, tmp_path
):
    directory = claimed(trainer, state_of(), str(tmp_path / "mine"))
    assert directory.path == tmp_path / "mine"
    assert [path.name for path in directory.path.iterdir()] == ["stream"]
    directory.release()
    assert [path.name for path in (directory.path / "stream").iterdir()] == ["lock"]


def test_a_directory_once_claimed_is_kept(trainer, tmp_path):
    state, directory = state_of(), RunDirectory(None)
    directory.claim(trainer, state)
    directory.claim(make_trainer(default_root_dir=tmp_path / "elsewhere"), state)
    assert directory.path == tmp_path / "merge_runs" / "version_0"


def test_a_resumed_stream_goes_on_in_its_own_directory(trainer, tmp_path):
    path = tmp_path / "kept"
    state_of("a").report.save(path / "report.json")
    assert claimed(trainer, state_of("a", dirpath=str(path))).path == path


def test_a_resumed_stream_may_be_sent_to_another_directory(trainer, tmp_path):
    state = state_of("a", dirpath=str(tmp_path / "old"))
    assert claimed(trainer, state, str(tmp_path / "new")).path == tmp_path / "new"
    assert state.dirpath == str(tmp_path / "new")


@pytest.mark.parametrize(
    ("held", "state"),
    [
        (("a", "b"), state_of()),
        (("a", "b"), state_of("a")),
        (("a", "b"), state_of("a", "c")),
        (("a",), state_of("a", "b")),
        (("a",), state_of(started={"task": "a"})),
    ],
    ids=["new_stream", "shorter", "other", "longer", "same_first_task"],
)
def test_the_directory_of_another_stream_is_refused(trainer, tmp_path, held, state):
    state_of(*held).report.save(tmp_path / "report.json")
    directory = RunDirectory(str(tmp_path))
    with pytest.raises(MisconfigurationException, match=rf"tasks merged there: {', '.join(held)}.*another dirpath"):
        directory.claim(trainer, state)
    assert directory.path is None


def test_a_task_merged_by_the_process_that_wrote_the_checkpoint_may_be_merged_again(trainer, tmp_path):
    state_of("a", "b").report.save(tmp_path / "report.json")
    state = state_of("a", dirpath=str(tmp_path), started={"task": "b"})
    assert claimed(trainer, state).path == tmp_path
    with pytest.raises(MisconfigurationException, match="holds another stream"):
        claimed(trainer, state_of("a", dirpath=str(tmp_path), started={"task": "c"}))


def test_a_file_in_the_place_of_the_directory_is_refused(trainer, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(MisconfigurationException, match="is a file; dirpath must name a directory"):
        claimed(trainer, state_of(), str(tmp_path / "mine"))


def test_a_report_that_is_none_is_refused(trainer, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"report.json is not a merge report"):
        claimed(trainer, state_of(), str(tmp_path))


def test_fast_dev_run_claims_nothing(tmp_path):
    state = state_of()
    assert claimed(make_trainer(fast_dev_run=True, default_root_dir=tmp_path), state, str(tmp_path / "a")).path is None
    assert state.dirpath is None
    assert list(tmp_path.iterdir()) == []


def test_a_refused_directory_stops_the_fit_before_training(tmp_path, without_figures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(Classifier(), Task(0), ContinualMergeCallback(dirpath="run"))
    shutil.rmtree("run/stream")
    module = Classifier()
    before = module.state_dict()["head.weight"].clone()
    with pytest.raises(MisconfigurationException, match="run holds another stream already"):
        fit(module, Task(0), ContinualMergeCallback(dirpath="run"))
    assert torch.equal(module.head.weight, before)


@pytest.mark.parametrize(
    ("number", "task", "name"),
    [
        (1, "digits", "merged-01-digits.ckpt"),
        (12, "a/b: c", "merged-12-a_b_c.ckpt"),
        (123, "Ziffern äöü", "merged-123-Ziffern_.ckpt"),
    ],
)
def test_checkpoints_are_named_after_number_and_task(trainer, tmp_path, number, task, name):
    module = Classifier()
    trainer.strategy.connect(module)
    path = claimed(trainer, state_of(), str(tmp_path)).save_checkpoint(trainer, number, task)
    assert path == str(tmp_path / name)
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["state_dict"]["head.weight"], module.head.weight)
    assert not {"optimizer_states", "callbacks"} & content.keys()


def test_without_a_directory_nothing_is_written(trainer, tmp_path):
    directory = RunDirectory(None)
    assert directory.save_checkpoint(trainer, 1, "a") is None
    directory.save_report(trainer, state_of("a").report)
    assert list(tmp_path.iterdir()) == []


def test_figures_table_and_report_of_a_fit_are_written_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, merge = Classifier(), ContinualMergeCallback(dirpath="run")
    for number in range(2):
        fit(module, Task(number), merge)
    assert sorted(path.name for path in merge.dirpath.iterdir()) == [
        "accuracy_matrix.png",
        "accuracy_over_stream.png",
        "changes.png",
        "merged-01-task_1.ckpt",
        "merged-02-task_2.ckpt",
        "path-02-task_2.png",
        "report.html",
        "report.json",
        "stream",
        "table.txt",
    ]
    for figure in merge.dirpath.glob("*.png"):
        assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (merge.dirpath / "table.txt").read_text() == merge.table(width=120)
    assert StreamReport.load(merge.dirpath / "report.json").accuracy == merge.report.accuracy

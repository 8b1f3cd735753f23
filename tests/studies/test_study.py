import pytest
from images import make_model, make_stream, make_trainer

from lightning_odem.studies.cells import Cell, run_cells
from lightning_odem.studies.study import Study, prepare


def names(bench, directory, show_progress):
    return run_cells([Cell(directory / "names.json", "names", lambda: bench.stream.names)], show_progress)[0]


def test_a_study_prints_its_table_and_writes_its_files_beside_cells_kept_elsewhere(tmp_path, capsys):
    def save(result, directory):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "result.txt").write_text(f"{result} {directory}")

    study = Study("names", names, " and ".join, save)
    arguments = make_trainer(), make_model(), make_stream(), str(tmp_path / "new")
    assert study.conduct(*arguments, models=str(tmp_path / "earlier")) == ["a", "b", "c"]
    assert capsys.readouterr().out == "a and b and c\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.txt"]
    assert (tmp_path / "earlier" / "names.json").exists()


def test_pretraining_without_a_source_task_is_refused():
    with pytest.raises(ValueError, match="pretrain_epochs=2 needs a stream with a source task.*got TaskStream"):
        prepare(make_trainer(), make_model(), make_stream(), pretrain_epochs=2)


def test_all_tasks_are_set_up_before_any_is_trained():
    stream = make_stream()
    prepare(make_trainer(), make_model(), stream)
    assert [len(task.splits.train) for task in stream] == [36] * 3

from images import make_model, make_stream, make_trainer

from lightning_odem.studies.cells import Cell, run_cells
from lightning_odem.studies.study import Study


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

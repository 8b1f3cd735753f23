import pytest

from lightning_odem.studies.cells import Cell, run_cells


def test_only_cells_without_a_file_are_run_and_results_come_in_order(tmp_path):
    ran = []

    def cell(number):
        return Cell(tmp_path / f"{number}.json", "", lambda: ran.append(number) or {"number": number})

    run_cells([cell(1)], show_progress=False)
    assert run_cells([cell(2), cell(1), cell(3)], show_progress=False) == [{"number": number} for number in (2, 1, 3)]
    assert ran == [1, 2, 3]


def test_a_cell_that_fails_leaves_no_file_and_the_results_of_those_before(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells([Cell(tmp_path / "done", "", lambda: 1), Cell(tmp_path / "broken", "", fail)], show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_a_cell_may_be_kept_in_a_format_of_its_own(tmp_path):
    options = {"write": lambda result, path: path.write_text(result), "read": lambda path: path.read_text()}
    assert run_cells([Cell(tmp_path / "cell.txt", "", lambda: "text", **options)], show_progress=False) == ["text"]
    assert (tmp_path / "cell.txt").read_text() == "text"

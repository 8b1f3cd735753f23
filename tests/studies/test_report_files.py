import json
from math import nan

from lightning_odem.report.figures import new_figure
from lightning_odem.studies.report_files import save_report


def test_what_is_undefined_is_null_in_json_and_empty_in_csv(tmp_path):
    files = save_report(
        "study",
        tmp_path / "new",
        data=[{"gain": nan, "t": [0.0, nan]}],
        columns=("task", "gain"),
        rows=[{"gain": nan, "task": "a"}, {"gain": 0.5, "task": "b"}],
        table="a table\n",
        figure=new_figure(1, 1),
    )
    assert [file.name for file in files] == ["study.json", "study.csv", "study.txt", "study.png"]
    assert json.loads(files[0].read_text()) == [{"gain": None, "t": [0.0, None]}]
    assert files[1].read_text() == "task,gain\na,\nb,0.5\n"
    assert files[2].read_text() == "a table\n"
    assert files[3].read_bytes().startswith(b"\x89PNG")

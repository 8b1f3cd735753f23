"""The notebook runs from top to bottom as it stands."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def cells(kind):
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_it_is_kept_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_its_prose_states_no_numbers_and_its_links_lead_somewhere():
    prose = "".join("".join(cell["source"]) for cell in cells("markdown"))
    assert not re.findall(r"\d", prose)
    links = re.findall(r"\]\(([^)]+)\)", prose)
    assert links
    assert all((NOTEBOOK.parent / link).is_file() for link in links)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))), reason="nbclient or ipykernel is not installed"
)
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(notebook, timeout=580, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    shown = outputs(notebook)
    assert not [output for output in shown if output.output_type == "error"]
    assert any("after slanted" in output.get("text", "") for output in shown)
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    assert "3 tasks are merged" in shown[-1]["data"]["text/plain"]
    assert (tmp_path / "digits_stream" / "report.html").is_file()

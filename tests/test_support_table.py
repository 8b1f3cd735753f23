import importlib.util
import sys
from pathlib import Path

import pytest
from scripts import run_script

SCRIPT = Path(__file__).parent.parent / "examples" / "support_table.py"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("support_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_launcher_that_spawns_is_refused_with_the_way_out(table):
    found = table.outcomes(("cpu", "ddp_spawn", 1), ["32-true"])
    assert found["32-true"].startswith("MisconfigurationException: Launchers that spawn or fork")


@pytest.mark.slow
def test_the_script_prints_a_row_per_strategy_and_the_errors_below():
    done = run_script(SCRIPT, "fsdp", "ddp_notebook")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "│ cpu" in line]
    assert [row[3] for row in rows] == ["fsdp", "ddp_notebook"]
    assert [row[7] for row in rows] == ["(1)", "(2)"]
    assert "\n(1) ValueError: The strategy `fsdp` requires a GPU accelerator" in done.stdout
    assert "MisconfigurationException: Launchers that spawn or fork" in done.stdout


@pytest.mark.slow
def test_two_processes_merge_in_every_precision_that_lightning_has(table):
    found = table.outcomes(("cpu", "ddp", 2), ["32-true", "16-mixed", "bf16-true", "transformer-engine"])
    assert found["32-true"] == found["bf16-true"] == "works"
    assert found["16-mixed"] == "works, but Lightning makes it bf16-mixed."
    assert found["transformer-engine"].startswith("ModuleNotFoundError: Requirement 'transformer_engine")


def test_a_process_that_crashes_costs_one_precision(table, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    found = table.outcomes(("cpu", "auto", 1), ["32-true", "64-true"])
    assert found == dict.fromkeys(["32-true", "64-true"], "The process ended with status 1.")


def test_a_process_that_hangs_is_killed(table, monkeypatch, tmp_path):
    script = tmp_path / "hangs"
    script.write_text("#!/bin/sh\nsleep 60\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    assert table.outcomes(("cpu", "auto", 1), ["32-true"], seconds=0.2) == {"32-true": "No end within 0.2 s."}

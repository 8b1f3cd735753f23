"""The quickstart is what the README shows, and its configuration comes with the package."""

import re
from pathlib import Path

import pytest
import yaml

from lightning_odem import ContinualMergeCallback
from lightning_odem.cli.command_line import QUICKSTART, main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").partition("## Use it")[0]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def report_of(cli):
    return next(found for found in cli.trainer.callbacks if isinstance(found, ContinualMergeCallback)).report


def printed_config(args, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*args, "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_quickstart_is_fit_tasks_with_the_configuration_of_the_package(capsys):
    shown = printed_config(["quickstart"], capsys)
    assert shown == printed_config(["fit_tasks", "--config", str(QUICKSTART)], capsys)
    assert shown["data"]["init_args"]["tasks"] == ["top", "right", "bottom", "left"]


def test_options_come_after_the_configuration_of_the_package(capsys):
    shown = printed_config(["quickstart", "--trainer.callbacks.method", "average"], capsys)
    assert shown["trainer"]["callbacks"][0]["init_args"]["method"] == "average"
    assert shown["trainer"]["callbacks"][0]["init_args"]["calibration_size"] == 512


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ode", "average"])
def test_the_quickstart_gives_what_the_readme_shows(method):
    report = report_of(main(["quickstart", "--trainer.callbacks.method", method]))
    shown = re.search(rf"^\| `{method}`.*\| ([\d.]+) \| (-?[\d.]+) \|$", README, re.MULTILINE)
    assert 100 * report.acc() == pytest.approx(float(shown[1]), abs=4)
    assert 100 * report.bwt() == pytest.approx(float(shown[2]), abs=5)

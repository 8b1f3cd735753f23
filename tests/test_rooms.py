"""The package's rooms: imports point one way, old paths lead to the new ones, and little comes with the callback."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lightning_odem
from lightning_odem.moved import MOVED

PACKAGE = Path(lightning_odem.__file__).parent
# Each may import what stands before it; the first are single files.
FILES = ["version", "arguments"]
ORDER = [
    *FILES,
    "metrics",
    "flow",
    "parameters",
    "calibration",
    "report",
    "methods",
    "tasks",
    "classifiers",
    "stream",
    "callback",
    "studies",
    "cli",
]
IMPORTS = [
    "import lightning.pytorch.cli",
    "from lightning_odem import ContinualMergeCallback",
    "import lightning_odem.cli",
]


def imported_rooms(file):
    """Rooms of the package that a file imports, also for types and within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_odem":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "lightning_odem"]
        yield from (name.split(".")[1] for name in names)


def test_there_are_at_most_twelve_rooms():
    rooms = ORDER[len(FILES) :]
    assert sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()) == sorted(rooms)
    assert len(rooms) <= 12


@pytest.mark.parametrize("room", ORDER[len(FILES) :])
def test_imports_point_one_way(room):
    found = {other for file in (PACKAGE / room).rglob("*.py") for other in imported_rooms(file)} - {room}
    if room == "stream":
        found -= {"tasks"}  # names that were there, for a while
    assert found <= set(ORDER[: ORDER.index(room)])


def test_the_checks_of_arguments_import_no_room():
    assert not set(imported_rooms(PACKAGE / "arguments.py"))


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_leads_to_the_new_one(old):
    sys.modules.pop(f"lightning_odem.{old}", None)
    with pytest.warns(DeprecationWarning, match="is now lightning_odem"):
        module = import_module(f"lightning_odem.{old}")
    assert module is import_module(f"lightning_odem.{MOVED[old]}")


def test_modules_of_an_old_package_are_found_under_the_new_one():
    sys.modules.pop("lightning_odem.durable.lock", None)
    with pytest.warns(DeprecationWarning, match="is now lightning_odem"):
        module = import_module("lightning_odem.durable.lock")
    assert module is import_module("lightning_odem.stream.store.lock")


def test_tasks_are_found_where_they_were():
    with pytest.warns(DeprecationWarning, match=r"lightning_odem\.tasks\.NpzStream"):
        stream = import_module("lightning_odem.stream").NpzStream
    assert stream is import_module("lightning_odem.tasks").NpzStream


def test_a_path_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"lightning_odem\.nothing"):
        import_module("lightning_odem.nothing")


@pytest.fixture(scope="module")
def imported():
    """What heavy modules there are in a fresh process after each of some imports."""
    heavy = {"timm", "torchvision", "matplotlib", "sklearn", "transformers", "peft"}
    heavy |= {"torch.distributed.checkpoint.state_dict", "matplotlib.backends.backend_agg"}
    code = "import sys\n" + "".join(f"{line}\nprint(sorted({heavy} & set(sys.modules)))\n" for line in IMPORTS)
    command = [sys.executable, "-W", "ignore", "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(IMPORTS, shown, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("line", IMPORTS[1:])
def test_an_import_brings_nothing_heavy_that_lightning_does_not(imported, line):
    assert imported[line] == imported["import lightning.pytorch.cli"]

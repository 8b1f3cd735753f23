import gc
import os
import sys
from collections import Counter
from itertools import cycle
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: several at a time share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# The tests have no package of their own (importlib mode); what several files share lies here.
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from entry_points import read_once

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = cycle(range(20000 + 1000 * _WORKER, 21000 + 1000 * _WORKER))


def pytest_configure(config):
    """Leave the order of files to what follows; pytest-xdist puts those with few tests last, however long they take."""
    config.option.loadscopereorder = False
    gc.disable()  # until all is collected: a third of that time goes into looking for garbage among what stays


def pytest_collection_modifyitems(items):
    """Put files of slow tests first, so that at the end no worker has a long one while the others have nothing."""
    tests = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path] / tests[item.path])


def pytest_collection_finish():
    """From here on garbage is collected, but not looked for among what is imported."""
    gc.freeze()
    gc.enable()
    read_once()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Give the processes that a test starts a port to meet at which no other test's take meanwhile.

    Left to itself Lightning asks the kernel for a free one, which another connection may have before it is bound.
    """
    os.environ["MASTER_PORT"] = str(next(_PORTS))


@pytest.fixture
def without_figures(monkeypatch):
    """Leave the figures out of the run directory: drawing them takes longer than all the rest of a small fit."""
    from figures import save_report_alone

    monkeypatch.setattr("lightning_odem.stream.report_files.save", save_report_alone)


@pytest.fixture
def small_stream(tmp_path, monkeypatch, without_figures):
    """What all tests of the callback want: an empty working directory, a fixed seed, no figures."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path

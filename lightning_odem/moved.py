"""Modules under the paths they had in earlier versions; to be removed with version 1.0."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

# Old path to new; a package stands for its modules too.
MOVED = {
    "attach": "stream.attach",
    "batch_norm": "calibration.batch_norm",
    "classifier": "classifiers.classifier",
    "classifiers.clip_text": "classifiers.clip",
    "clip": "classifiers",
    "comparison": "studies",
    "division": "parameters.division",
    "durable": "stream.store",
    "evaluation": "stream.evaluation",
    "files": "parameters.files",
    "measurement": "stream.measurement",
    "methods.arguments": "arguments",
    "merging": "stream.merging",
    "offline": "cli",
    "offline.checkpoint": "parameters.checkpoint",
    "offline.command": "cli.merge",
    "cli.command": "cli.merge",
    "pretraining": "classifiers.pretraining",
    "probe": "classifiers.probe",
    "processes": "parameters.processes",
    "progress": "report.progress",
    "random_state": "stream.random_state",
    "rundir": "stream.directory",
    "shards": "parameters.shards",
    "snapshot": "parameters.snapshot",
    "state": "stream.state",
    "stream.digits": "tasks.digits",
    "stream.task": "tasks.task",
    "studies.display": "studies.cells",
    "studies.figures": "studies.comparison_report",
    "tangent": "classifiers.tangent",
    "trace": "stream.trace",
    "trainer": "studies.trainer",
    "weights": "parameters.weights_file",
    "methods.granularity": "methods.ode_paper",
    "methods.needs.trail": "methods.needs.snapshots",
    "methods.needs.training_run": "methods.needs.sources",
    "methods.task_losses": "methods.refinement",
    "tasks.sampler": "tasks.task",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if _new(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        new = _new(module.__name__)
        assert new is not None, "found by find_spec"
        warnings.warn(
            f"{module.__name__} is now {new}; the old path goes with version 1.0.", DeprecationWarning, stacklevel=2
        )
        sys.modules[module.__name__] = import_module(new)


def _new(name: str) -> str | None:
    package, _, path = name.partition(".")
    head, _, rest = path.rpartition(".")
    if package != __package__ or not path:
        return None
    if path in MOVED:
        return f"{package}.{MOVED[path]}"
    return f"{package}.{MOVED[head]}.{rest}" if head in MOVED else None


def install() -> None:
    """Let old paths be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # Before the finder of files, which would load modules of a moved package a second time.
        sys.meta_path.insert(0, _Finder())

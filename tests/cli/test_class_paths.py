"""A configuration names modules, transforms and functions of known packages, not whatever can be imported."""

import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from torch import nn

from lightning_odem.cli.class_paths import UntrustedPathError, check_class_paths, take_trusted
from lightning_odem.cli.command_line import main
from lightning_odem.cli.merge import main as merge

STREAM, CALLBACK = "lightning_odem.tasks.DigitsStream", "lightning_odem.ContinualMergeCallback"
QUIET = ["--trainer.logger=false", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]


def named(path, **arguments):
    return Namespace(class_path=path, init_args=Namespace(**arguments))


def stream(transform):
    return Namespace(data=named(STREAM, tasks=["rotated"], train_transform=transform))


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """Modules of a user in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("mine.py").write_text(
        "import os, lightning as L\n"
        "from torch import nn\n"
        "from lightning_odem.tasks import DigitsStream\n"
        "class Stream(DigitsStream): ...\n"
        "class Blur(nn.Module): ...\n"
        "class Plain:\n    def __call__(self, image): return image\n"
        "class Config: ...\n"
        "class Model(L.LightningModule): ...\n"
        "def turned(image): return image\n"
    )
    yield
    sys.modules.pop("mine", None)


DANGEROUS = [
    "os.system",
    "os.popen",
    "posix.system",
    "subprocess.getoutput",
    "subprocess.Popen",
    "shutil.rmtree",
    "os.makedirs",
    "builtins.exec",
    "builtins.open",
    "pathlib.Path",
    "functools.partial",
    "importlib.import_module",
    "torch.os.system",
    "torch.nn.functional.importlib.import_module",
    "lightning_odem.cli.command_line.os.system",
    "torch.hub.load",
    "torch.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.testing._internal.common_utils.shell",
    "mine.os.system",
    "mine.turned",
    "mine.Plain",
    "no.such.module",
]


@pytest.mark.parametrize("path", DANGEROUS)
def test_what_is_no_transform_is_refused(path):
    with pytest.raises(UntrustedPathError, match=f"train_transform names {path}, which is neither"):
        check_class_paths(stream(named(path)))


@pytest.mark.parametrize("path", DANGEROUS[:4])
@pytest.mark.parametrize("owner", [STREAM, "mine.Stream", "lightning_odem.methods.FunctionMerge", CALLBACK])
def test_wherever_it_is_hidden_it_is_found(path, owner):
    hidden = [
        named(owner, function=named(path)),
        named(owner, transforms=[named(path)]),
        {"class_path": owner, "init_args": {"function": {"class_path": path, "init_args": {}}}},
        {"class_path": owner, "dict_kwargs": {"function": {"class_path": path}}},
        Namespace(trainer=Namespace(callbacks=[named(CALLBACK, method=named(owner, function=named(path)))])),
    ]
    for config in hidden:
        with pytest.raises(UntrustedPathError, match=path.rpartition(".")[2]):
            check_class_paths(config)


@pytest.mark.parametrize(
    "path",
    [
        "torchvision.transforms.v2.RandomHorizontalFlip",
        "torchvision.transforms.functional.hflip",
        "torch.nn.Identity",
        "torch.nn.functional.relu",
        "torch.nn.functional.gelu",
        "torch.flip",
        "timm.data.create_transform",
        "lightning_odem.tasks.shifts.inverted",
        "mine.Blur",
    ],
)
def test_transforms_and_functions_of_known_packages_are_allowed(path):
    check_class_paths(stream(named(path)))


def test_a_function_given_by_its_path_alone_is_looked_at_too():
    import os

    with pytest.raises(UntrustedPathError, match=r"train_transform names \w+\.system"):
        check_class_paths(stream(os.system))
    check_class_paths(stream(nn.functional.relu))
    check_class_paths(stream(None))


def test_own_modules_are_named_on_the_command_line():
    for path in ("mine.turned", "mine.Plain"):
        check_class_paths(stream(named(path)), trusted=["mine"])
        with pytest.raises(UntrustedPathError, match="on the command line: --trust mine"):
            check_class_paths(stream(named(path)), trusted=["min", "mine.more"])


def test_arguments_of_the_users_classes_are_theirs():
    check_class_paths(Namespace(model=named("mine.Model", config=named("mine.Config"))))
    check_class_paths(Namespace(trainer=Namespace(logger=named("lightning.pytorch.loggers.CSVLogger", save_dir="x"))))


def test_the_option_is_taken_out_of_the_arguments_in_both_forms():
    assert take_trusted(["a", "--trust=x", "b", "--trust", "y", "--trust"]) == (["x", "y"], ["a", "b"])


def config(path, **arguments):
    transform = {"class_path": path, "init_args": arguments}
    data = {"class_path": "DigitsStream", "init_args": {"tasks": ["rotated"], "train_transform": transform}}
    backbone = {"class_path": "torch.nn.Flatten"}
    model = {"class_path": "TaskClassifier", "init_args": {"backbone": backbone}}
    Path("c.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    return ["--config", "c.yaml"]


@pytest.mark.parametrize(("path", "argument"), [("os.system", "command"), ("subprocess.getoutput", "cmd")])
def test_the_command_line_runs_nothing(path, argument, capsys):
    for run in (
        lambda: main(["fit_tasks", *config(path, **{argument: "touch ran"}), *QUIET]),
        lambda: main(["merge", *config(path, **{argument: "touch ran"}), "a.ckpt", "--output", "o.safetensors"]),
        lambda: merge([*config(path, **{argument: "touch ran"}), "a.ckpt", "--output", "o.safetensors"]),
    ):
        with pytest.raises(SystemExit):
            run()
        assert "train_transform names" in capsys.readouterr().err
    assert not Path("ran").exists()


def test_a_configuration_cannot_vouch_for_itself(capsys):
    arguments = config("os.system", command="touch ran")
    Path("c.yaml").write_text(Path("c.yaml").read_text() + "trust: [posix, os]\n")
    with pytest.raises(SystemExit):
        main(["fit_tasks", *arguments, *QUIET])
    assert not Path("ran").exists()

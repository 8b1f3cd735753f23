from pathlib import Path

import pytest
import torch
from scripts import run_script
from toy import Classifier, Incoming, Task, close, everything, fit

from lightning_odem import ContinualMergeCallback
from lightning_odem.cli.command_line import main
from lightning_odem.cli.remove import remove_from_stream
from lightning_odem.methods import IsotropicMerge
from lightning_odem.stream.store import StreamLock

pytestmark = pytest.mark.usefixtures("small_stream")


def stream(*names, dirpath="streams/shop", **options):
    """A stream of tasks, whose fine-tuned models lie in ``fine_tuned``; returns its callback."""
    module, incoming = Classifier(), Incoming()
    merge = ContinualMergeCallback(dirpath=dirpath, calibration_size=12, **options)
    Path("fine_tuned").mkdir(exist_ok=True)
    for name in names:
        fit(module, Task(len(name), name), incoming, merge)
        torch.save({"state_dict": incoming.models[-1]}, f"fine_tuned/{name}.ckpt")
    return merge


@pytest.mark.slow
def test_the_command_takes_a_task_out_and_says_so():
    stream("shoes", "hats", "sweater")
    command = ["-m", "lightning_odem", "remove", "streams/shop", "shoes"]
    done = run_script(*command, "--checkpoint", "fine_tuned/shoes.ckpt")
    assert done.returncode == 0, done.stderr
    assert "Taken out: shoes. It was in what was measured after hats, sweater." in done.stdout
    written = Path("streams/shop/merged-02-without-shoes.ckpt").absolute()
    assert f"the stream holds hats, sweater. Merged weights: {written}" in done.stdout
    assert ContinualMergeCallback(dirpath="streams/shop", calibration_size=12).report.tasks == ["hats", "sweater"]


@pytest.mark.parametrize("method", ["average", IsotropicMerge(0.5), IsotropicMerge()])
def test_the_method_and_its_settings_are_those_of_the_stream(method, capsys):
    stream("shoes", "hats", "sweater", method=method)
    main(["remove", "streams/shop", "hats", "--checkpoint=fine_tuned/hats.ckpt"])
    assert "Taken out: hats. It was in what was measured after sweater." in capsys.readouterr().out
    found = ContinualMergeCallback(method, dirpath="streams/shop", calibration_size=12)
    expected = stream("shoes", "sweater", method=method, dirpath="without")
    modules = [Classifier(), Classifier()]
    for merge, module in zip((found, expected), modules, strict=True):
        merge.load_task(module, "sweater")
    assert close(*map(everything, modules), atol=1e-5)


def test_the_method_may_be_given():
    stream("shoes", "hats", "sweater", method=IsotropicMerge(0.5))
    settings = ["--method=lightning_odem.methods.IsotropicMerge", "--method.scale=0.5"]
    main(["remove", "streams/shop", "hats", "--checkpoint=fine_tuned/hats.ckpt", *settings])
    with pytest.raises(ValueError, match="merged tasks of this stream"):
        remove_from_stream("streams/shop", "shoes", "fine_tuned/shoes.ckpt", "ode")


@pytest.mark.parametrize(
    ("directory", "task", "checkpoint", "message"),
    [
        ("streams/shops", "shoes", "shoes", "There is no stream in streams/shops"),
        ("streams/shop", "boots", "shoes", "'boots' is not in the stream, which holds: shoes, hats"),
        ("streams/shop", "shoes", "boots", "There is no file of weights at fine_tuned/boots.ckpt"),
        ("streams/shop", "shoes", "hats", "was merged with another model"),
    ],
)
def test_what_cannot_be_done_ends_with_a_message(directory, task, checkpoint, message, capsys):
    stream("shoes", "hats")
    files = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["remove", directory, task, f"--checkpoint=fine_tuned/{checkpoint}.ckpt"])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(Path().rglob("*")) == files


def test_a_stream_in_use_is_left_alone(capsys):
    stream("shoes", "hats")
    lock = StreamLock("streams/shop/stream/lock")
    lock.acquire()
    with pytest.raises(SystemExit):
        main(["remove", "streams/shop", "shoes", "--checkpoint=fine_tuned/shoes.ckpt"])
    lock.release()
    assert "in use by" in capsys.readouterr().err


def test_a_stream_that_does_not_know_its_settings_has_the_default_ones():
    merge = stream("shoes", "hats")
    state = merge._directory.read(merge._state)
    state.settings = {}
    merge._directory.rewrite(state)
    assert remove_from_stream("streams/shop", "shoes", "fine_tuned/shoes.ckpt").tasks == ["hats"]

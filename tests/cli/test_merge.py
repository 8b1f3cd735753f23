import hashlib
import json
import pathlib
import sys
import weakref

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import run_script
from torch import nn
from toy import Classifier, Task, fit, make_trainer, same

from lightning_odem import ContinualMergeCallback
from lightning_odem.cli.command_line import main
from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.methods import ClosedFormMerge, MergeMethod, MergeResult, OPCMMerge, SecondMoments, Snapshots

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def state(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(4, 3).to(dtype), "a.bias": torch.randn(4).to(dtype), "ids": torch.arange(3)}


def save(name, content):
    """Save in the format the name asks for, a folder without a suffix."""
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".ckpt":
        torch.save({"state_dict": content, "epoch": 1, "pytorch-lightning_version": L.__version__}, path)
    elif path.suffix == "":
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "test"}')
        save_file(content, path / "model.safetensors")
    else:
        torch.save(content, path)
    return name


def three(*names, dtype=torch.float32):
    return [save(name, state(seed, dtype)) for seed, name in enumerate(names)]


def weighted_mean(weights, dtype=torch.float32):
    total = sum(weights)
    states = [state(seed, dtype) for seed in range(len(weights))]
    return {
        name: sum(w / total * each[name].double() for w, each in zip(weights, states, strict=True))
        for name in ("a.weight", "a.bias")
    }


def assert_mean(found, expected, tolerance=1e-6):
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=tolerance)


SAFETENSORS = ("a.safetensors", "b.safetensors", "c.safetensors")
MIXED = [("a.ckpt", "b.safetensors", "c.pt"), ("a", "b.ckpt", "c")]


def test_files_of_adapters_are_refused_since_they_do_not_say_their_scale():
    for name in SAFETENSORS:
        save(name, {"query.lora_A.weight": torch.ones(2, 6), "query.lora_B.weight": torch.ones(4, 2)})
    with pytest.raises(ValueError, match="scale is not known.* Files of adapters do not say it"):
        merge_checkpoints(SAFETENSORS, "merged.safetensors")


@pytest.mark.parametrize("names", [SAFETENSORS, *MIXED])
def test_average_is_the_weighted_mean(names):
    merge_checkpoints(three(*names), "merged.safetensors", weights=[1.0, 2.0, 1.0])
    found = load_file("merged.safetensors")
    assert_mean(found, weighted_mean([1, 2, 1]))
    assert found.keys() == state(0).keys()
    assert found["ids"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    names = [f"{number}.safetensors" for number in range(9)]
    merge_checkpoints(three(*names, dtype=dtype), "merged.safetensors")
    found, expected = load_file("merged.safetensors"), weighted_mean([1] * 9, dtype)
    for name, value in expected.items():
        assert found[name].dtype == dtype
        # A value half way between two of the dtype may go either way.
        gap = torch.finfo(dtype).eps * value.abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((found[name].double() - value).abs() <= 0.5 * gap + 1e-6).all()


def test_double_precision_stays():
    merge_checkpoints(three("a.pt", "b.pt", dtype=torch.float64), "merged.safetensors")
    assert_mean(load_file("merged.safetensors"), weighted_mean([1, 1], torch.float64), 1e-15)


@pytest.mark.parametrize("method", ["opcm", "average", "ties", "magmax"])
def test_equals_what_the_callback_made_of_the_same_models(method, without_figures):
    torch.manual_seed(0)
    module, merge = Classifier(batch_norm=True), ContinualMergeCallback(method=method, weights=[1.0, 2.0, 1.0])
    torch.save(module.state_dict(), "base.pt")
    for number in (1, 2, 3):
        saving = ModelCheckpoint(dirpath=f"task_{number}", filename="last")
        fit(module, Task(number), saving, merge, enable_checkpointing=True)
    paths = [f"task_{number}/last.ckpt" for number in (1, 2, 3)]
    merge_checkpoints(paths, "merged.safetensors", method, base="base.pt", weights=[1.0, 2.0, 1.0])
    assert same(load_file("merged.safetensors"), dict(module.state_dict()))


def test_running_statistics_follow_the_policy():
    def norm(value):
        return {"norm.running_mean": torch.full((2,), value), "norm.running_var": torch.ones(2), "w": torch.ones(1)}

    paths = [save("a.pt", norm(0.0)), save("b.pt", norm(3.0))]
    for policy, expected in {"average": 1.5, "keep": 0.0}.items():
        merge_checkpoints(paths, f"{policy}.safetensors", batch_norm=policy)
        assert load_file(f"{policy}.safetensors")["norm.running_mean"].tolist() == [expected] * 2


def test_what_is_excluded_is_kept_of_every_checkpoint():
    paths = [
        save("a.pt", {**state(0), "heads.a": torch.ones(2), "top": torch.zeros(5)}),
        save("b.pt", {**state(1), "heads.b": torch.ones(3), "top": torch.ones(4)}),
    ]
    merge_checkpoints(paths, "merged.safetensors", exclude=["heads", "top"])
    found = load_file("merged.safetensors")
    assert_mean(found, weighted_mean([1, 1]))
    assert [len(found[name]) for name in ("heads.a", "heads.b", "top")] == [2, 3, 4]


def test_a_weight_of_zero_leaves_no_trace():
    paths = three("a.pt", "b.pt", "c.pt")
    merged = merge_checkpoints(paths, "merged.safetensors", weights=[1.0, 0.0, 1.0])
    expected = {name: (state(0)[name] + state(2)[name]).double() / 2 for name in ("a.weight", "a.bias")}
    assert_mean(load_file("merged.safetensors"), expected)
    assert [record.t for record in merged.records] == [1.0, 0.0, 0.5]


def test_the_metadata_say_how_it_was_made():
    method = OPCMMerge(alpha=0.25)
    paths = three("runs/x/last.pt", "runs/y/last.pt")
    merge_checkpoints(paths, "merged.safetensors", method, base=save("base.pt", state(9)), weights=[1.0, 3.0])
    with safe_open("merged.safetensors", "pt") as file:
        found = file.metadata()
    assert found["format"] == "pt"
    assert found["method"] == "opcm"
    assert json.loads(found["settings"])["alpha"] == 0.25
    assert json.loads(found["tasks"]) == ["last", "last_2"]
    assert json.loads(found["weights"]) == [1.0, 3.0]
    assert found["version"]
    first, second = (hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() for path in paths)
    assert json.loads(found["sha256"]) == {"last": {"last.pt": first}, "last_2": {"last.pt": second}}
    assert list(json.loads(found["base_sha256"])) == ["base.pt"]
    assert torch.load("merged.ckpt", weights_only=True)["lightning_odem"]["method"] == "opcm"


class Hyper(L.LightningModule):
    def __init__(self, width=2, name="x"):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def test_step(self, batch, batch_idx):
        self.log("sum", self.layer(batch).sum())


def test_the_checkpoint_beside_it_loads_into_the_module_of_the_first():
    for seed in range(2):
        torch.manual_seed(seed)
        trainer = L.Trainer(**QUIET, barebones=False, enable_checkpointing=False)
        trainer.strategy.connect(Hyper(width=5, name="wide"))
        trainer.save_checkpoint(f"{seed}.ckpt")
    merge_checkpoints(["0.ckpt", "1.ckpt"], "merged.safetensors")
    module = Hyper.load_from_checkpoint("merged.ckpt")
    assert module.hparams.name == "wide"
    assert same(dict(module.state_dict()), load_file("merged.safetensors"))
    module = Hyper(width=5)
    make_trainer().test(module, torch.ones(2, 5), ckpt_path="merged.ckpt", verbose=False)
    assert same(dict(module.state_dict()), load_file("merged.safetensors"))


def test_folders_become_a_folder():
    merge_checkpoints(three("a", "b"), "merged")
    assert sorted(path.name for path in pathlib.Path("merged").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads(pathlib.Path("merged/config.json").read_text()) == {"model_type": "test"}
    assert_mean(load_file("merged/model.safetensors"), weighted_mean([1, 1]))


def test_one_incoming_model_is_in_memory_at_a_time(monkeypatch):
    from lightning_odem.parameters import model_files

    read, alive, most = model_files.read_checkpoint, [], []

    def watched(path, *select):
        most.append(sum(tensor() is not None for tensor in alive))
        content = read(path, *select)
        alive.extend(map(weakref.ref, content.values()))
        return content

    monkeypatch.setattr(model_files, "read_checkpoint", watched)
    merge_checkpoints(three(*(f"{number}.safetensors" for number in range(6))), "merged.safetensors")
    assert len(most) > 12
    assert max(most) == 0


def test_code_in_a_checkpoint_is_refused_and_not_run():
    class Marker:
        def __reduce__(self):
            return pathlib.Path.touch, (pathlib.Path("ran"),)

    torch.save({**state(1), "extra": Marker()}, "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt holds .*only running code"):
        merge_checkpoints([save("a.pt", state(0)), "b.pt"], "merged.safetensors")
    assert not pathlib.Path("ran").exists()


class Never(MergeMethod):
    """Fails the test if any work is started."""

    def start(self, incoming, context):
        raise AssertionError("a merge was started")

    def merge(self, merged, incoming, t, context):
        return MergeResult(merged)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"checkpoints": ["a.pt", "none.pt"]}, FileNotFoundError, r"none\.pt"),
        ({"checkpoints": []}, ValueError, "nothing to merge"),
        ({"checkpoints": ["a.pt", "odd.pt"]}, ValueError, r"a\.bias: in the a\.pt model only"),
        ({"base": "odd.pt"}, ValueError, r"a\.bias: in the a\.pt model only"),
        ({"weights": [1.0]}, ValueError, "weights has 1 entries, but there are 2 checkpoints"),
        ({"weights": [1.0, -1.0]}, ValueError, "-1.0 at index 1"),
        ({"tasks": ["x"]}, ValueError, "tasks has 1 entries"),
        ({"tasks": ["x", "x"]}, ValueError, "same name"),
        ({"exclude": "heads"}, ValueError, r"write \['heads'\]"),
        ({"exclude": ["head"]}, ValueError, r"exclude=\['head'\] matches no tensor.*a\.weight"),
        ({"batch_norm": "recalibrate"}, ValueError, "give model and data"),
        ({"data": "DigitsStream"}, ValueError, "model and data go together"),
        ({"output": "a.safetensors"}, FileExistsError, r"a\.safetensors exists already"),
        ({"output": "old.safetensors"}, FileExistsError, r"old\.ckpt exists already"),
        ({"output": "merged"}, ValueError, r"does not end in \.safetensors"),
        ({"checkpoints": ["b.ckpt"], "output": "b.safetensors", "overwrite": True}, ValueError, "would overwrite one"),
        ({"method": "opcm"}, ValueError, "the base model, which this merge does not have.*base names the base model"),
        ({"method": "ode"}, ValueError, "calibration samples.*model and data bring samples and a loss"),
        ({"method": "odd"}, ValueError, "Unknown merge method 'odd'"),
    ],
)
def test_refused_before_work_starts(arguments, error, message):
    three("a.pt", "b.ckpt")
    save("a.safetensors", state(0))
    save("old.ckpt", state(0))
    save("odd.pt", {"a.weight": torch.zeros(4, 3)})
    before = {path.name: path.read_bytes() for path in pathlib.Path().iterdir()}
    plain = {"checkpoints": ["a.pt", "b.ckpt"], "output": "merged.safetensors", "method": Never()}
    with pytest.raises(error, match=f"(?s){message}"):
        merge_checkpoints(**plain | arguments)
    assert {path.name: path.read_bytes() for path in pathlib.Path().iterdir()} == before


@pytest.mark.parametrize("need", [SecondMoments(), Snapshots(4)])
def test_what_only_a_training_leaves_behind_is_refused(need):
    method = Never()
    method.needs = (need,)
    with pytest.raises(ValueError, match="which this merge does not have"):
        merge_checkpoints(three("a.pt"), "merged.safetensors", method)


def test_an_output_is_replaced_when_told_to():
    merge_checkpoints([save("b.pt", state(1))], "merged.safetensors")
    merge_checkpoints([save("a.pt", state(0))], "merged.safetensors", overwrite=True)
    assert same(load_file("merged.safetensors"), state(0))
    assert same(torch.load("merged.ckpt", weights_only=True)["state_dict"], state(0))


def test_a_merge_that_fails_leaves_the_old_output(monkeypatch):
    merge_checkpoints([save("a.pt", state(0))], "merged.safetensors")
    files = sorted(pathlib.Path().iterdir())
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        merge_checkpoints(["a.pt", "a.pt"], "merged.safetensors", overwrite=True)
    assert sorted(pathlib.Path().iterdir()) == files
    assert same(load_file("merged.safetensors"), state(0))


def test_the_command_line_takes_everything_and_prints_a_table(capsys):
    three("a.ckpt", "b.safetensors", "c.pt")
    save("base.safetensors", state(9))
    arguments = ["merge", "a.ckpt", "b.safetensors", "c.pt", "--base", "base.safetensors", "--weights", "[1,2,1]"]
    assert main([*arguments, "--method", "opcm", "--output", "merged.safetensors"]) is None
    shown = capsys.readouterr().out
    assert [line.split()[:3] for line in shown.splitlines()[1:4]] == [
        ["a", "1", "1.000"],
        ["b", "2", "0.667"],
        ["c", "1", "0.250"],
    ]
    assert "merged.safetensors and merged.ckpt" in shown
    merge_checkpoints(["a.ckpt", "b.safetensors", "c.pt"], "again.safetensors", "opcm", "base.safetensors", [1, 2, 1])
    assert same(load_file("again.safetensors"), load_file("merged.safetensors"))


def test_options_come_from_a_file_and_methods_with_settings(capsys):
    three("a.pt", "b.pt")
    method = {"class_path": "lightning_odem.methods.OPCMMerge", "init_args": {"alpha": 0.125}}
    config = {
        "method": method,
        "base": save("base.pt", state(9)),
        "output": "merged.safetensors",
        "exclude": ["a.bias"],
    }
    pathlib.Path("merge.yaml").write_text(yaml.safe_dump(config))
    main(["merge", "a.pt", "b.pt", "--config", "merge.yaml"])
    with safe_open("merged.safetensors", "pt") as file:
        assert json.loads(file.metadata()["settings"])["alpha"] == 0.125


def test_moments_cannot_be_measured_on_files_alone():
    three("a.pt", "b.pt")
    method = ClosedFormMerge(measured=0.5)
    with pytest.raises(ValueError, match="'closed_form' needs calibration samples .* model and data bring samples"):
        merge_checkpoints(["a.pt", "b.pt"], "merged.safetensors", method, save("base.pt", state(9)))


def test_a_refusal_is_one_message_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["merge", *three("a.pt"), "none.pt", "--output", "merged.safetensors"])
    assert exit_info.value.code == 2
    assert "none.pt" in capsys.readouterr().err


def test_the_help_of_the_program_mentions_merge(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "lightning-odem merge --help" in capsys.readouterr().out


@pytest.mark.slow
def test_the_console_script_merges():
    three("a.pt", "b.pt")
    script = pathlib.Path(sys.executable).parent / "lightning-odem"
    done = run_script(script, "merge", "a.pt", "b.pt", "--output", "out/merged.safetensors")
    assert done.returncode == 0, done.stderr
    assert_mean(load_file("out/merged.safetensors"), weighted_mean([1, 1]))


@pytest.mark.parametrize("name", ["[red]x", ":bomb:", "\x1b]0;owned\x07t", "\x1b[2J", "[/red]x"])
def test_names_of_tasks_are_shown_as_they_are(name, tmp_path, capsys):
    for file in "ab":
        save_file({"w": torch.ones(1)}, tmp_path / f"{file}.safetensors")
    checkpoints = [str(tmp_path / f"{file}.safetensors") for file in "ab"]
    main(["merge", *checkpoints, "--tasks", json.dumps([name, "o"]), "--output", str(tmp_path / "o.safetensors")])
    shown = capsys.readouterr().out
    assert name.replace("\x1b", "\\x1b").replace("\x07", "\\x07") in shown
    assert "\x1b" not in shown

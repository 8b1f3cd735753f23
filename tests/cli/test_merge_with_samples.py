"""Merges of files by methods that need samples, which a stream of tasks gives."""

import json
import pathlib

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy import close, same

from lightning_odem import ContinualMergeCallback, TaskClassifier
from lightning_odem.cli.command_line import main
from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.tasks import DigitsStream

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
SMALL = {"backbone": "test_vit", "backbone_args": {"in_chans": 1, "img_size": 32}}


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Two tasks fine-tuned and merged by the callback: the files of their models, and the merged weights."""
    folder = tmp_path_factory.mktemp("stream")
    torch.manual_seed(0)
    model = TaskClassifier(**SMALL)
    torch.save({f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}, folder / "base.pt")
    merge = ContinualMergeCallback("ode", calibration_size=24, dirpath=str(folder / "run"))
    for task in DigitsStream(tasks=["rotated", "inverted"]):
        saving = ModelCheckpoint(dirpath=folder, filename=task.task_name)
        limits = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
        L.Trainer(**QUIET, **limits, callbacks=[saving, merge]).fit(model, datamodule=task)
    return folder, {name: value.clone() for name, value in model.state_dict().items()}


def calibrated(folder, output, names=("rotated.ckpt", "inverted.ckpt"), method="ode", tasks=None, **more):
    data = DigitsStream(tasks=["rotated", "inverted"])
    options = {"base": str(folder / "base.pt"), "calibration_size": 24, "data": data} | more
    paths = [str(folder / name) for name in names]
    return merge_checkpoints(paths, output, method, model=TaskClassifier(**SMALL), tasks=tasks, **options)


@pytest.mark.slow
def test_ode_equals_what_the_callback_made_of_the_same_models_and_samples(stream):
    folder, expected = stream
    merged = calibrated(folder, "merged.safetensors")
    found = load_file("merged.safetensors")
    assert close(found, expected, rtol=0, atol=1e-6)
    assert merged.records[1].calibration == {"rotated": 12, "inverted": 12}
    module = TaskClassifier.load_from_checkpoint("merged.ckpt")
    assert same(dict(module.state_dict()), found)
    assert list(module.heads) == ["rotated", "inverted"]


@pytest.mark.slow
def test_moments_are_measured_on_the_samples_of_the_stream(stream):
    folder, _ = stream
    found = {}
    for measured in (0.0, 1.0):
        config = {
            "method": {"class_path": "lightning_odem.methods.ClosedFormMerge", "init_args": {"measured": measured}},
            "model": {"class_path": "TaskClassifier", "init_args": SMALL},
            "data": {"class_path": "DigitsStream", "init_args": {"tasks": ["rotated", "inverted"]}},
            "base": str(folder / "base.pt"),
            "output": f"{measured}.safetensors",
        }
        pathlib.Path("merge.yaml").write_text(yaml.safe_dump(config))
        main(["merge", str(folder / "rotated.ckpt"), str(folder / "inverted.ckpt"), "--config", "merge.yaml"])
        found[measured] = load_file(f"{measured}.safetensors")
    assert json.loads(safe_open("1.0.safetensors", "pt").metadata()["settings"])["measured"] == 1.0
    matrices = {name for name, tensor in found[0.0].items() if "blocks" in name and tensor.dim() == 2}
    changed = {name for name, tensor in found[0.0].items() if not torch.equal(tensor, found[1.0][name])}
    assert matrices <= changed
    assert not any(name.endswith("bias") for name in changed)


@pytest.mark.slow
def test_heads_that_no_checkpoint_has_are_fitted_on_the_base_model(stream):
    folder, expected = stream
    for name in ("rotated", "inverted"):
        content = torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]
        bare = {name.removeprefix("backbone."): value for name, value in content.items() if "heads" not in name}
        save_file(bare, folder / f"bare_{name}.safetensors")
    calibrated(folder, "merged.safetensors", ("bare_rotated.safetensors", "bare_inverted.safetensors"))
    assert close(load_file("merged.safetensors"), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_merge_with_samples_writes_a_folder_with_the_names_of_the_first(stream):
    folder, expected = stream
    paths = []
    for name in ("rotated", "inverted"):
        content = torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]
        bare = {name.removeprefix("backbone."): value for name, value in content.items() if "heads" not in name}
        paths.append(pathlib.Path(f"{name}_folder").resolve())
        paths[-1].mkdir()
        (paths[-1] / "config.json").write_text('{"model_type": "test"}')
        save_file(bare, paths[-1] / "model.safetensors")
    calibrated(folder, "merged", paths)
    found = load_file("merged/model.safetensors")
    assert found.keys() == load_file("rotated_folder/model.safetensors").keys()
    backbone = {name.removeprefix("backbone."): expected[name] for name in expected if "heads" not in name}
    assert close(found, backbone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_module_that_trains_its_heads_needs_them_in_the_checkpoint(stream):
    folder, _ = stream
    model = TaskClassifier(**SMALL, head="train")
    content = torch.load(folder / "rotated.ckpt", weights_only=True)["state_dict"]
    save_file({n: v for n, v in content.items() if "heads" not in n}, "rotated.safetensors")
    with pytest.raises(ValueError, match=r"rotated\.safetensors lacks heads\.rotated\.bias, heads\.rotated\.weight"):
        merge_checkpoints(
            ["rotated.safetensors"], "m.safetensors", "ode", str(folder / "base.pt"), model=model, data=DigitsStream()
        )


def test_checkpoints_that_do_not_go_with_the_stream_are_refused(stream):
    folder, _ = stream
    with pytest.raises(ValueError, match=r"rotated, base do not go with the tasks of the stream: rotated, inverted"):
        calibrated(folder, "merged.safetensors", ("rotated.ckpt", "base.pt"))


@pytest.mark.slow
def test_the_command_line_takes_a_model_and_data(stream):
    folder, expected = stream
    config = {
        "base": str(folder / "base.pt"),
        "method": {"class_path": "lightning_odem.ODEMerge"},
        "calibration_size": 24,
        "model": {"class_path": "TaskClassifier", "init_args": SMALL},
        "data": {"class_path": "DigitsStream", "init_args": {"tasks": ["inverted", "rotated"]}},
        "output": "merged.safetensors",
    }
    pathlib.Path("merge.yaml").write_text(yaml.safe_dump(config))
    main(["merge", str(folder / "rotated.ckpt"), str(folder / "inverted.ckpt"), "--config", "merge.yaml"])
    assert close(load_file("merged.safetensors"), expected, rtol=0, atol=1e-6)

import json
import pathlib

import pytest
import torch
from safetensors.torch import save_file

from lightning_odem.parameters.checkpoint import read_checkpoint, read_hyper_parameters

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "steps": torch.tensor(3)}


def assert_same(found, expected=STATE):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)


def save_shards(folder, index, *shards):
    for number, shard in enumerate(shards):
        path = folder / f"part-{number}.{'safetensors' if 'safetensors' in index else 'bin'}"
        save_file(shard, path) if path.suffix == ".safetensors" else torch.save(shard, path)
    names = {name: f"part-{number}{path.suffix}" for number, shard in enumerate(shards) for name in shard}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.ckpt", "old.bin"])
def test_reads_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    if name == "w.safetensors":
        save_file(STATE, path)
    elif name == "old.bin":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"state_dict": STATE, "epoch": 3} if name == "w.ckpt" else STATE, path)
    assert_same(read_checkpoint(str(path)))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_reads_a_folder(tmp_path, name):
    save_file(STATE, tmp_path / name) if name == "model.safetensors" else torch.save(STATE, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert_same(read_checkpoint(tmp_path))


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_reads_a_folder_of_shards(tmp_path, index):
    first, *others = STATE.items()
    save_shards(tmp_path, index, dict([first]), dict(others))
    assert_same(read_checkpoint(tmp_path))


def test_safetensors_come_before_pickles_in_a_folder(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_same(read_checkpoint(tmp_path))


def test_tensors_can_be_read_after_the_file_was_replaced(tmp_path):
    torch.save(STATE, tmp_path / "w.pt")
    found = read_checkpoint(tmp_path / "w.pt")
    torch.save({"other": torch.zeros(9)}, tmp_path / "new.pt")
    (tmp_path / "new.pt").replace(tmp_path / "w.pt")
    assert_same(found)


def test_a_folder_without_weights_lists_what_would_do(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no weights: none of model.safetensors, .*pytorch_model.bin"):
        read_checkpoint(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_a_missing_shard_is_named(tmp_path):
    save_shards(tmp_path, "model.safetensors.index.json", STATE)
    (tmp_path / "part-0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-0\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_tensor_no_shard_has_is_named(tmp_path):
    names = save_shards(tmp_path, "model.safetensors.index.json", STATE)
    index = {"weight_map": {**names, "b.weight": "part-0.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no shard has: b\.weight"):
        read_checkpoint(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(STATE, tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(STATE, "../secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"outside its folder: \.\./secret"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of shards"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_folder_is_refused_and_not_run(tmp_path, old):
    content = {**STATE, "extra": Marker(tmp_path / "ran")}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds .*only running code"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_hyper_parameters_come_from_lightning_checkpoints_only(tmp_path):
    known = {"hparams_name": "kwargs", "hyper_parameters": {"lr": 0.5}}
    torch.save({"state_dict": STATE, "epoch": 1, **known}, tmp_path / "w.ckpt")
    torch.save(STATE, tmp_path / "w.pt")
    save_file(STATE, tmp_path / "model.safetensors")
    assert read_hyper_parameters(tmp_path / "w.ckpt") == known
    assert read_hyper_parameters(tmp_path / "w.pt") == {}
    assert read_hyper_parameters(tmp_path / "model.safetensors") == {}
    assert read_hyper_parameters(tmp_path) == {}

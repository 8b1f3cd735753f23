import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_odem.parameters.model_folder import ModelFolder


@pytest.fixture
def folder(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    return tmp_path


def test_modules_in_sub_folders_are_read_under_their_names(folder):
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.zeros(1)}, folder / "2_Dense" / "model.safetensors")
    assert list(ModelFolder(folder).read()) == ["w"]
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    assert list(ModelFolder(folder).read()) == ["w", "2_Dense.linear.weight"]


@pytest.mark.parametrize("content", ["{", "[1]", '[{"name": "x"}]', '{"a": 1}'])
def test_a_broken_list_of_modules_is_refused(folder, content):
    (folder / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json is no list of modules"):
        ModelFolder(folder)


@pytest.mark.parametrize("place", ["..", "../x", "/etc", "a/../../x"])
def test_modules_outside_the_folder_are_refused(folder, place):
    (folder / "modules.json").write_text(json.dumps([{"path": place}]))
    with pytest.raises(ValueError, match="modules outside its folder"):
        ModelFolder(folder)


def test_weights_of_no_listed_module_are_refused(folder):
    (folder / "modules.json").write_text(json.dumps([{"path": ""}]))
    for place in ("query_0", "checkpoint-3", "onnx", ".cache"):
        (folder / place).mkdir()
        save_file({"w": torch.zeros(1)}, folder / place / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights in query_0, which modules\.json does not list"):
        ModelFolder(folder)


def test_only_an_adapter_with_weights_is_one(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert not ModelFolder(folder).is_adapter
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert ModelFolder(folder).is_adapter
    assert list(ModelFolder(folder).read()) == ["a"]


def test_files_of_weights_in_any_format_are_told_from_others(folder):
    for name in ("pytorch_model-1.bin", "model.safetensors.index.json", "flax_model.msgpack", "spiece.model", "a.py"):
        (folder / name).touch()
    assert [str(file) for file in ModelFolder(folder).others()] == ["a.py", "config.json", "spiece.model"]


@pytest.mark.parametrize(("content", "message"), [("{", "is no JSON"), ("[]", "holds list, not an object")])
def test_a_broken_configuration_is_refused(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ModelFolder(folder).config()

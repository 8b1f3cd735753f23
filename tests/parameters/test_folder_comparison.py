import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_odem.parameters.folder_comparison import compare_folders


@pytest.fixture
def make(tmp_path):
    def make(name, **files):
        (tmp_path / name).mkdir()
        save_file({"embed": torch.ones(3, 2)}, tmp_path / name / "model.safetensors")
        for file, content in {"config.json": {"vocab_size": 3}, **files}.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name / file).write_text(text)
        return tmp_path / name

    return make


def test_folders_without_a_tokenizer_and_files_say_nothing(make):
    assert compare_folders([make("a", **{"vocab.txt": "a"}), make("b"), "c.safetensors"]) == []


def test_tokenizers_of_unknown_form_say_nothing(make):
    odd = {"tokenizer.json": {"model": {"vocab": 3}}}
    assert compare_folders([make("a", **{"vocab.txt": "a"}), make("b", **odd)]) == []


def test_settings_that_differ_are_named_and_versions_are_not(make):
    first = make("a", **{"config.json": {"heads": 2, "transformers_version": "4"}})
    second = make("b", **{"config.json": {"heads": 4, "transformers_version": "5"}})
    assert compare_folders([first, second]) == [
        f"config.json of {second} differs from that of {first}, which goes for the merged model: heads (2, 4)."
    ]


def test_modules_are_compared_by_their_kind(make):
    def modules(*kinds):
        return {"modules.json": [{"path": "", "type": kind} for kind in kinds]}

    first = make("a", **modules("old.Transformer", "old.Pooling"))
    assert compare_folders([first, make("b", **modules("new.Transformer", "new.Pooling"))]) == []
    assert len(compare_folders([first, make("c", **modules("new.Transformer"))])) == 1

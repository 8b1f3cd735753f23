import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_odem.parameters.token_tensors import row_count, token_tensors


@pytest.fixture
def make(tmp_path):
    def make(config, **tensors):
        save_file(
            {name.replace("_0_", "."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
        )
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def test_the_configuration_says_how_many_rows_there_are(make):
    rows = {"odd_0_weight": torch.ones(7, 2)}
    assert row_count(make({"vocab_size": 7}, **rows)) == 7
    assert row_count(make({"text_config": {"vocab_size": 7}, "vision_config": {}}, **rows)) == 7


def test_without_it_the_embedding_says_it(make):
    assert row_count(make({"vocab_size": 8}, wte_0_weight=torch.ones(7, 2))) == 7
    assert row_count(make({}, odd_0_weight=torch.ones(7, 2))) is None


def test_excluded_rows_do_not_count(make):
    assert row_count(make({"vocab_size": 7}, wte_0_weight=torch.ones(7, 2)), ["wte"]) is None


def test_two_vocabularies_are_refused(make):
    config = {"encoder": {"vocab_size": 7}, "decoder": {"vocab_size": 5}}
    with pytest.raises(ValueError, match="several vocabularies, of 5, 7 tokens"):
        row_count(make(config, a_0_wte=torch.ones(7, 2), b_0_wte=torch.ones(5, 2)))


def test_biases_of_the_output_have_a_row_for_each_token_too():
    state = {
        "shared.weight": torch.ones(7, 2),
        "final_logits_bias": torch.ones(1, 7),
        "cls.predictions.bias": torch.ones(7),
        "layer.weight": torch.ones(2, 2),
        "steps": torch.arange(7),
    }
    assert list(token_tensors(state, 7)) == ["shared.weight", "final_logits_bias", "cls.predictions.bias"]


def test_what_has_as_many_rows_by_chance_is_not_taken_for_tokens():
    with pytest.raises(ValueError, match=r"not known whether layer\.weight \[7, 2\] has a row"):
        token_tensors({"wte.weight": torch.ones(7, 2), "layer.weight": torch.ones(7, 2)}, 7)

from pathlib import Path

import pytest
import torch
from scripts import run_script

SCRIPT = Path(__file__).parent.parent / "examples" / "merge_sentence_encoders.py"


@pytest.mark.slow
def test_two_encoders_are_trained_merged_and_loaded(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=31, max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = {token: row for row, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])}
    transformers.BertTokenizerFast(vocab=tokens).save_pretrained(tmp_path / "bert")
    modules = [models.Transformer(str(tmp_path / "bert")), models.Pooling(16)]
    library.SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "tiny"))
    done = run_script(SCRIPT, "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "are those of the merged weights." in done.stdout
    assert done.stdout.splitlines()[-1].startswith("tiny-both")

import sys
from pathlib import Path

import pytest
import torch

from lightning_odem import ContinualMergeCallback
from lightning_odem.cli.command_line import main
from lightning_odem.studies import Comparison

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "warm", "cold", "day", "and", "a", "very", "##ly"]
SENTENCES = {"mood": ["a good day", "a bad and very very bad day"], "weather": ["warm", "coldly cold", "a day"]}


@pytest.fixture
def text_classification(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # as for a command run in the root of the repository
    import examples.text_classification as module

    return module


@pytest.fixture
def encoder(tmp_path):
    folder = tmp_path / "encoder"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task, sentences in SENTENCES.items():
        lines = [f"{split}\t{label}\t{text}\n" for label, text in enumerate(sentences) for split in _splits()]
        (folder / f"{task}.tsv").write_text("".join(lines))
    return str(folder)


def _splits():
    return ["train"] * 6 + ["val", "test"]


@pytest.fixture
def arguments(text_classification, encoder, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = [f"--data.root={root}", f"--data.tokenizer={encoder}", "--data.tasks=[mood, weather]"]
    options = [f"--model.folder={encoder}", "--data.batch_size=8", "--trainer.accelerator=cpu"]
    return ["--config", str(ROOT / "configs" / "text.yaml"), *tasks, *options, "--trainer.enable_progress_bar=false"]


def test_inputs_are_token_ids_padded_to_the_longest_sentence_of_the_task(text_classification, encoder, root):
    stream = text_classification.TextStream(root, encoder)
    assert [(task.task_name, task.num_classes) for task in stream] == [("mood", 2), ("weather", 3)]
    ids, label = stream["mood"].splits.test[0]
    assert ids.tolist() == [2, 11, 5, 9, 3, 0, 0, 0, 0]  # [CLS] a good day [SEP], of 7 words and two marks
    assert (ids.dtype, int(label)) == (torch.int64, 0)
    assert stream["weather"].splits.val.tensors[0].tolist() == [[2, 7, 3, 0, 0], [2, 8, 13, 8, 3], [2, 11, 9, 3, 0]]


def test_a_limit_takes_the_first_training_samples(text_classification, encoder, root):
    task = text_classification.TextStream(root, encoder, train_samples=7)["weather"]
    assert task.splits.train.targets.tolist() == [0] * 6 + [1]
    assert [len(task.splits.val), len(task.splits.test), task.num_classes] == [3, 3, 3]


@pytest.mark.parametrize("line", ["train\tgood\tday", "dev\t0\tday", "train\t0 day"])
def test_a_line_of_another_format_is_refused_with_its_place(text_classification, encoder, root, line):
    with (Path(root) / "mood.tsv").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"mood\.tsv, line 17 is not split<TAB>label<TAB>text: '(train|dev)"):
        text_classification.TextStream(root, encoder)


def test_a_folder_without_tasks_is_refused(text_classification, encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No \.tsv file"):
        text_classification.TextStream(str(tmp_path), encoder)


def test_padding_does_not_change_the_features(text_classification, encoder):
    model = text_classification.TextClassifier(encoder).eval()
    ids = torch.tensor([[2, 5, 3, 0, 0, 0], [2, 11, 5, 9, 3, 0]])
    features = model.features(ids)
    assert features.shape == (2, 32)
    torch.testing.assert_close(features[:1], model.features(ids[:1, :3]))
    hidden = model.backbone.bert(input_ids=ids[1:, :5]).last_hidden_state
    torch.testing.assert_close(features[1:], hidden.mean(dim=1))


def test_without_transformers_the_extra_that_installs_it_is_named(text_classification, encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-odem\[clip\]'"):
        text_classification.TextClassifier(encoder)


def test_a_checkpoint_of_the_whole_module_is_loaded_by_the_class_alone(arguments, text_classification, tmp_path):
    cli = main(["fit", *arguments, "--data.tasks=[mood]"])
    cli.trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = text_classification.TextClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert model.state_dict().keys() == cli.model.state_dict().keys()
    assert all(value.equal(cli.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_fit_tasks_merges_the_tasks_of_the_config(arguments, capsys):
    cli = main(["fit_tasks", *arguments])
    (callback,) = [found for found in cli.trainer.callbacks if isinstance(found, ContinualMergeCallback)]
    assert callback.report.tasks == ["mood", "weather"]
    assert "after weather" in capsys.readouterr().out


def test_compare_merges_the_tasks_of_the_config_with_several_methods(arguments, capsys):
    methods = ["average", "isotropic", "ode"]
    options = [f"--methods={methods}", "--calibration_sizes=[12]", "--orders=1", "--dirpath=here"]
    main(["compare", *arguments, *options])
    comparison = Comparison.load("here")
    assert comparison.methods == methods
    assert all(0.0 <= value <= 1.0 for cell in comparison.cells for value in cell.report.accuracy[-1])
    out = capsys.readouterr().out
    assert all(method in out for method in methods)

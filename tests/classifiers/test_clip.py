import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, cross_entropy
from toy import fit, make_trainer, same, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.classifiers import ClipClassifier
from lightning_odem.classifiers.clip_prompts import PROMPTS
from lightning_odem.classifiers.clip_weights import read_clip_vision
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.stream import Stream
from lightning_odem.tasks import SUITE_20, ArrayDataset, Splits, Task, TorchvisionStream
from lightning_odem.tasks.catalogue import CATALOGUE
from lightning_odem.tasks.class_names import CLASS_NAMES
from lightning_odem.tasks.selection import Selection

NAMES = {"pets": ["cat", "dog", "polar bear"], "signs": ["stop", "yield"]}
START, END = "<|startoftext|>", "<|endoftext|>"


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")


def tiny_config(transformers, **vision):
    vocabulary = 2 * 94 + 2
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    return transformers.CLIPConfig(
        text_config={**sizes, **special, "vocab_size": vocabulary, "max_position_embeddings": 48, "projection_dim": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 16, **vision},
        projection_dim=16,
    )


def write_tokenizer(folder):
    """Single characters, at the end of a word or not; the merges are empty."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{character}</w>" for character in characters), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.fixture(scope="session")
def base_folder(transformers, tmp_path_factory):
    """A randomly initialised CLIP model as save_pretrained writes it, with tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("clip") / "base"
    write_tokenizer(folder)
    transformers.CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(tiny_config(transformers))
        for parameter in model.parameters():  # further apart than the start values, which are nearly zero
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(transformers, base_folder):
    """The folder's model, as transformers runs it."""
    return transformers.CLIPModel.from_pretrained(base_folder).eval()


@pytest.fixture
def write_vision(transformers, base_folder, tmp_path):
    """Writes a vision tower moved away from the base model's, as a published fine-tuned one."""

    def write(name, seed=1, **vision):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if vision:
                tower = transformers.CLIPVisionModel(tiny_config(transformers, **vision).vision_config)
            else:
                tower = transformers.CLIPVisionModel.from_pretrained(base_folder)
            for parameter in tower.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        tower.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def classifier(base_folder):
    return ClipClassifier(str(base_folder), class_names=NAMES, prompts={"signs": ["a {} sign.", "the sign {}!"]})


@pytest.fixture
def images():
    return torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def task(name, class_names, size=32, seed=3):
    generator = np.random.default_rng(seed)
    classes = len(class_names or [0])
    labels = np.arange(8) % classes
    data = ArrayDataset(generator.integers(256, size=(8, size, size, 3), dtype=np.uint8), labels)
    return Task(name, classes, lambda: Splits(data, data, data), batch_size=4, class_names=class_names)


# -- logits and heads


def test_logits_of_a_single_template_are_those_of_clip(transformers, base_folder, reference, classifier, images):
    texts = [f"a photo of a {name}." for name in NAMES["pets"]]
    tokens = transformers.CLIPTokenizer.from_pretrained(str(base_folder))(texts, padding=True, return_tensors="pt")
    pixels = transformers.CLIPImageProcessor.from_pretrained(base_folder)(list(images), return_tensors="pt")
    with torch.no_grad():
        expected = reference(**tokens, **pixels).logits_per_image
        actual = classifier(images, "pets")
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_head_is_the_normalised_mean_of_normalised_text_embeddings(transformers, base_folder, reference, classifier):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(base_folder))
    for label, name in enumerate(NAMES["signs"]):
        embeddings = []
        for text in (f"a {name} sign.", f"the sign {name}!"):  # one by one, hence without padding
            with torch.no_grad():
                tokens = tokenizer(text, return_tensors="pt")
                embedding = reference.text_projection(reference.text_model(**tokens).pooler_output)[0]
            embeddings.append(embedding / embedding.norm())
        mean = (embeddings[0] + embeddings[1]) / 2
        torch.testing.assert_close(classifier.heads["signs"][label], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_text_longer_than_the_context_is_cut_off(classifier):
    classifier.add_task("long", ["x" * 200, "y" * 200])
    assert classifier.heads["long"].isfinite().all()


def test_prediction_and_calibration_steps_use_the_head_of_the_task(classifier, images):
    targets = torch.tensor([0, 1, 0, 1, 1])
    for name in NAMES:
        predictions, same_targets = classifier.prediction_step((images, targets), name)
        assert torch.equal(predictions, classifier(images, name))
        assert torch.equal(same_targets, targets)
        loss = classifier.calibration_step((images, targets), name)
        torch.testing.assert_close(loss, cross_entropy(predictions, targets))


def test_images_alone_are_predicted_but_have_no_loss_on_labels(classifier, images):
    for batch in (images[:2], [images[:2]]):
        logits, targets = classifier.prediction_step(batch, "pets")
        assert torch.equal(logits, classifier(images[:2], "pets"))
        assert targets is None
        with pytest.raises(ValueError, match=r"task 'pets' have no labels.*`loss: logits`"):
            classifier.calibration_step(batch, "pets")


def test_logits_are_the_scaled_cosines_of_features_and_head(classifier, images):
    cosines = cosine_similarity(classifier.features(images)[:, None], classifier.heads["pets"][None], dim=-1)
    torch.testing.assert_close(classifier(images, "pets"), classifier.logit_scale.exp() * cosines)


def test_autocast_leaves_the_logits_in_full_precision(classifier, images):
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(images, "pets")
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_unknown_task_is_refused_with_those_there_are(classifier, images):
    with pytest.raises(ValueError, match=r"no head for task 'cars'; there are heads for \['pets', 'signs'\]"):
        classifier(images, "cars")


def test_template_without_a_place_for_the_class_is_refused(base_folder, transformers):
    with pytest.raises(ValueError, match="'signs' need {} for the class name"):
        ClipClassifier(str(base_folder), prompts={"signs": ["a sign."]})


@pytest.mark.parametrize("names", [[], "stop"])
def test_class_names_must_be_a_list(classifier, names):
    with pytest.raises(ValueError, match="needs a list of class names"):
        classifier.add_task("signs", names)


def test_task_name_that_cannot_name_a_head_is_refused(classifier):
    with pytest.raises(ValueError, match=r"'a\.b' cannot name a head"):
        classifier.add_task("a.b", ["x"])


# -- images


@pytest.mark.parametrize("shape", [(32, 32), (48, 64), (20, 28)])
def test_images_are_prepared_as_clips_own_processor_does(transformers, base_folder, classifier, shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.stack([4 * x, 5 * y, 127 + 100 * np.sin(x / 3) * np.cos(y / 4)], axis=2).clip(0, 255).astype(np.uint8)
    expected = transformers.CLIPImageProcessor.from_pretrained(base_folder)(Image.fromarray(image), return_tensors="pt")
    actual = classifier.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None])
    one_level = 1 / 255 / 0.26  # resizing rounds to uint8, on tensors not always as on PIL images
    torch.testing.assert_close(actual, expected["pixel_values"], rtol=0, atol=1.01 * one_level)


def test_grey_images_are_those_with_three_equal_channels(classifier, images):
    grey = images[:, :1]
    torch.testing.assert_close(classifier(grey, "pets"), classifier(grey.expand(-1, 3, -1, -1), "pets"))


def test_floating_images_are_taken_as_fractions(classifier, images):
    torch.testing.assert_close(classifier(images / 255, "pets"), classifier(images, "pets"), rtol=1e-4, atol=1e-4)


def test_integer_images_other_than_uint8_are_refused(classifier, images):
    with pytest.raises(TypeError, match="found torch.int64"):
        classifier(images.long(), "pets")


# -- reading vision towers


def test_vision_tower_is_read_by_the_names_of_the_module(write_vision, classifier):
    folder = write_vision("tower")
    state = classifier.read_checkpoint(folder)
    assert same(state, load_file(f"{folder}/model.safetensors"))
    assert state.keys() == {name for name, _ in classifier.named_parameters() if name.startswith("vision_model.")}


def test_vision_tower_of_the_base_model_is_its_own(base_folder, classifier):
    expected = {name: value for name, value in weights(classifier).items() if name.startswith("vision_model.")}
    assert same(classifier.read_checkpoint(str(base_folder)), expected)


@pytest.mark.parametrize(
    ("name", "value", "own"),
    [("patch_size", 16, 8), ("hidden_size", 64, 32), ("projection_dim", 24, 16), ("num_hidden_layers", 3, 2)],
)
def test_vision_tower_of_another_base_model_is_refused_with_both_values(write_vision, classifier, name, value, own):
    folder = write_vision("other", **{name: value})
    with pytest.raises(
        ValueError, match=f"other was not fine-tuned from this base model: it has {name} {value}, not {own}"
    ):
        classifier.read_checkpoint(folder)


def test_missing_folder_is_named(classifier, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        classifier.read_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        ClipClassifier(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [None, b"not a file of tensors", "truncated"])
def test_folder_without_readable_weights_is_refused(write_vision, classifier, content):
    file = Path(write_vision("tower")) / "model.safetensors"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:2000] if content == "truncated" else content)
    with pytest.raises(ValueError, match="tower holds no CLIP model that can be read"):
        classifier.read_checkpoint(str(file.parent))


def test_corrupt_configuration_is_refused(write_vision, classifier):
    folder = Path(write_vision("tower"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="tower holds no CLIP model that can be read"):
        classifier.read_checkpoint(str(folder))


def test_folder_that_lacks_a_tensor_is_refused_instead_of_filled_at_random(write_vision, classifier):
    file = Path(write_vision("tower")) / "model.safetensors"
    state = {name: value for name, value in load_file(file).items() if "post_layernorm.bias" not in name}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no complete CLIPVisionModel: 1 tensors are missing.*post_layernorm.bias"):
        classifier.read_checkpoint(str(file.parent))


def test_vision_tower_alone_is_no_base_model(write_vision, base_folder):
    folder = Path(write_vision("tower"))
    for file in base_folder.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="tower is a model of type 'clip_vision_model'; expected is 'clip'"):
        ClipClassifier(str(folder))


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-odem\[clip\]'"):
        ClipClassifier("openai/clip-vit-base-patch32")
    with pytest.raises(ImportError, match=r"pip install 'lightning-odem\[clip\]'"):
        read_clip_vision("tanganke/clip-vit-base-patch32_mnist")


# -- training and merging


def test_only_the_vision_tower_is_trainable(classifier):
    trainable = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in classifier.named_parameters() if name.startswith("vision_model.")}


def test_text_tower_is_not_part_of_the_state(classifier):
    tops = {name.split(".")[0] for name in classifier.state_dict()}
    assert tops == {"vision_model", "visual_projection", "logit_scale", "heads"}
    assert copy.deepcopy(classifier)._text is classifier._text


def test_merging_published_towers_averages_them_and_nothing_else(write_vision, classifier):
    before = weights(classifier)
    towers = [classifier.read_checkpoint(write_vision(f"tower{seed}", seed)) for seed in (1, 2)]
    stream = Stream("average")
    for name, tower in zip(NAMES, towers, strict=True):
        shared = take_snapshot(classifier, lambda key: not key.startswith("heads."))
        stream.merge(classifier, {**shared, **tower}, name)
    after = weights(classifier)
    for name, value in after.items():
        if name.startswith("vision_model."):
            torch.testing.assert_close(value, (towers[0][name] + towers[1][name]) / 2)
        else:
            assert torch.equal(value, before[name])


def test_callback_merges_the_vision_tower_and_measures_every_task(small_stream, base_folder, transformers):
    module = ClipClassifier(str(base_folder), lr=1e-3)
    before = weights(module)
    merge = ContinualMergeCallback(calibration_size=8)
    for name, names in NAMES.items():
        fit(module, task(name, names), merge, max_epochs=1)
    after = weights(module)
    moved = {name for name, value in after.items() if name in before and not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("vision_model.") for name in moved)
    assert [len(row) for row in merge.report.accuracy] == [1, 2]
    assert module.current_task == "signs"


def test_heads_survive_a_checkpoint(small_stream, base_folder, images, transformers):
    module = ClipClassifier(str(base_folder))
    trainer = fit(module, task("pets", NAMES["pets"]), max_epochs=1, enable_checkpointing=False)
    trainer.save_checkpoint("module.ckpt")
    loaded = ClipClassifier.load_from_checkpoint("module.ckpt", map_location="cpu")
    assert torch.equal(loaded(images, "pets"), module(images, "pets"))


def test_names_given_to_the_module_come_before_those_of_the_data(classifier):
    before = classifier.heads["pets"].clone()
    make_trainer().test(classifier, datamodule=task("pets", ["x", "y", "z"]), verbose=False)
    assert torch.equal(classifier.heads["pets"], before)


def test_data_without_class_names_are_refused(classifier):
    with pytest.raises(ValueError, match=r"Pass class_names=\{'birds': \[\.\.\.\]\}"):
        fit(classifier, task("birds", None))


def test_head_with_another_number_of_classes_than_the_data_is_refused(classifier):
    with pytest.raises(ValueError, match="head of task 'pets' has 3 classes, the datamodule has 2"):
        fit(classifier, task("pets", ["cat", "dog"]))


# -- names of classes


def test_names_in_the_data_are_spelt_out():
    data = ArrayDataset(np.zeros((3, 8, 8), dtype=np.uint8), [0, 1, 2])
    data.classes = ["polar_bear", "church/outdoor", "Ram C/V"]
    selection = Selection(Selection(data, data.targets), data.targets)
    named = Task("places", 3, lambda: Splits(selection, selection, selection))
    assert named.class_names == ["polar bear", "church outdoor", "Ram C/V"]


def test_names_given_to_a_task_are_left_as_they_are_and_read_no_data():
    assert task("cars", ["polar_bear"]).class_names == ["polar_bear"]
    assert "splits" not in vars(task("cars", ["polar_bear"]))


def test_task_without_names_has_none():
    assert task("cars", None).class_names is None


def test_torchvision_tasks_take_names_from_the_table_or_the_data(tmp_path):
    classes = ["airplane", "baseball_diamond"]
    for name in classes:
        (tmp_path / "NWPU-RESISC45" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8)).save(tmp_path / "NWPU-RESISC45" / name / f"{number}.png")
    (tmp_path / "fer2013").mkdir()
    stream = TorchvisionStream(tmp_path, ["resisc45", "fer2013"], image_size=8)
    assert stream["resisc45"].class_names == ["airplane", "baseball diamond"]
    assert stream["fer2013"].class_names == CLASS_NAMES["fer2013"]


# -- the package's tables and configurations


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_table_has_a_name_of_its_own_for_every_class(name):
    assert len(set(CLASS_NAMES[name])) == CATALOGUE[name].num_classes


def test_every_task_of_the_suites_has_templates_of_its_own():
    assert PROMPTS.keys() == set(SUITE_20)
    for templates in PROMPTS.values():
        assert len(set(templates)) == len(templates)
        assert all(template.count("{}") == 1 for template in templates)


@pytest.mark.parametrize(("size", "name"), [("b32", "base-patch32"), ("b16", "base-patch16"), ("l14", "large-patch14")])
def test_configuration_takes_every_tower_from_the_base_model_it_was_fine_tuned_from(size, name):
    path = Path(__file__).parents[2] / "configs" / f"clip_table1_{size}.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["model"]["init_args"]["model"] == f"openai/clip-vit-{name}"
    assert config["checkpoints"] == f"tanganke/clip-vit-{name}_{{task}}"

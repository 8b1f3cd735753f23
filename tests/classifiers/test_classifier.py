import inspect

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem import CalibrationOptions, ContinualMergeCallback
from lightning_odem.classifiers.classifier import TaskClassifier
from lightning_odem.classifiers.pretraining import pretrain
from lightning_odem.classifiers.tangent import Linearized

SIZE, CHANNELS = 16, 3


class Backbone(nn.Module):
    """A small network of one's own, with batch norm and dropout."""

    num_features = 6

    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.1)

    def forward(self, images):
        return self.dropout(self.norm(self.conv(images)).relu()).mean((2, 3))


class Stripes(L.LightningDataModule):
    """A class is the phase of bright stripes: linearly separable from convolution features."""

    def __init__(self, task_name="stripes", num_classes=3, channels=CHANNELS, count=48, offset=0, seed=0):
        super().__init__()
        self.task_name, self.num_classes = task_name, num_classes
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % num_classes
        images = torch.randint(0, 60, (count, channels, SIZE, SIZE), generator=generator)
        for image, label in zip(images, labels, strict=True):
            image[label % channels, :: 2 + label] += 150
        self.data = TensorDataset(images.to(torch.uint8), labels + offset)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=20)

    test_dataloader = val_dataloader


def make_trainer(**more):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return L.Trainer(**options | more)


def fit(model, data, **more):
    trainer = make_trainer(**more)
    trainer.fit(model, datamodule=data)
    return trainer


def images_of(data):
    return data.data.tensors[0]


def accuracy(model, data):
    model.eval()
    with torch.no_grad():
        logits, targets = model.prediction_step(data.data[:], data.task_name)
    model.train()
    return (logits.argmax(1) == targets).float().mean().item()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_two_tasks_in_a_row_keep_their_own_heads():
    model, first, second = TaskClassifier(Backbone()), Stripes("a", 3), Stripes("b", 4, seed=1)
    fit(model, first)
    head = copy_of(model.heads["a"])
    fit(model, second)
    assert [(name, head.out_features) for name, head in model.heads.items()] == [("a", 3), ("b", 4)]
    assert same(copy_of(model.heads["a"]), head)
    assert model.current_task == "b"
    assert model(images_of(first)).shape == (48, 4)
    assert model(images_of(first), "a").shape == (48, 3)


def test_training_changes_the_backbone_and_lowers_the_loss():
    model, data = TaskClassifier(Backbone(), lr=0.02), Stripes()
    fit(model, data, limit_train_batches=1, max_epochs=1)
    before = copy_of(model.backbone)
    losses = [model.calibration_step(data.data[:], "stripes").item()]
    fit(model, data, max_epochs=8)
    losses.append(model.calibration_step(data.data[:], "stripes").item())
    assert not torch.equal(model.backbone.conv.weight, before["conv.weight"])
    assert not torch.equal(model.backbone.norm.weight, before["norm.weight"])
    assert losses[1] < losses[0]


def test_probe_head_beats_chance_before_any_training_and_is_frozen():
    model, data = TaskClassifier(Backbone(), lr=0.0, weight_decay=0.0), Stripes()
    fit(model, data)
    assert accuracy(model, data) > 0.6
    assert not any(parameter.requires_grad for parameter in model.heads.parameters())


def test_probe_is_fitted_once_and_a_second_fit_leaves_it():
    model, data = TaskClassifier(Backbone(), lr=0.05), Stripes()
    fit(model, data)
    head, backbone = copy_of(model.heads), copy_of(model.backbone)
    fit(model, data)
    assert not same(copy_of(model.backbone), backbone)
    assert same(copy_of(model.heads), head)


def test_probe_is_fitted_on_the_calibration_dataset_where_there_is_one():
    class Augmented(Stripes):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros_like(images_of(self)), self.data.tensors[1]), batch_size=16)

        def calibration_dataset(self):
            return self.data

    plain, augmented = TaskClassifier(Backbone(), lr=0.0), TaskClassifier(Backbone(), lr=0.0)
    augmented.load_state_dict(plain.state_dict())
    fit(plain, Stripes())
    fit(augmented, Augmented())
    assert same(copy_of(plain.heads), copy_of(augmented.heads))


def test_trained_head_trains_and_the_heads_of_other_tasks_do_not():
    model = TaskClassifier(Backbone(), head="train")
    fit(model, Stripes("a"))
    first = copy_of(model.heads["a"])
    assert first["weight"].any()
    fit(model, Stripes("b"), limit_train_batches=1)
    start = copy_of(model.heads["b"])
    fit(model, Stripes("b"))
    assert not same(copy_of(model.heads["b"]), start)
    assert same(copy_of(model.heads["a"]), first)
    assert not any(parameter.requires_grad for parameter in model.heads["a"].parameters())


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_norm_statistics_stand_still_exactly_when_frozen(freeze):
    model = TaskClassifier(Backbone(), freeze_batch_norm=freeze)
    before = copy_of(model.backbone.norm)["running_mean"]
    fit(model, Stripes())
    assert torch.equal(model.backbone.norm.running_mean, before) == freeze
    assert model.backbone.norm.training != freeze


def test_train_mode_spares_frozen_batch_norm_only():
    model = TaskClassifier(Backbone()).eval().train()
    assert [model.training, model.backbone.dropout.training, model.backbone.norm.training] == [True, True, False]


def test_uint8_and_float_images_give_equal_logits():
    model, data = TaskClassifier(Backbone()), Stripes()
    fit(model, data)
    images = images_of(data)
    model.eval()
    torch.testing.assert_close(model(images), model(images.float() / 255), rtol=0, atol=0)


def test_normalisation_is_that_of_the_arguments():
    model = TaskClassifier(nn.Flatten(), mean=[0.2], std=[0.1])
    expected = ((torch.tensor([0.0, 51.0, 255.0]) / 255 - 0.2) / 0.1).view(1, 3)
    torch.testing.assert_close(model.features(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)), expected)


def test_normalisation_is_by_default_that_of_the_timm_model():
    model = TaskClassifier("test_efficientnet")
    assert model.normalize.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    grey = TaskClassifier("test_efficientnet", {"in_chans": 1})
    assert grey.normalize.mean.flatten().tolist() == pytest.approx([(0.485 + 0.456 + 0.406) / 3])


def test_normalisation_of_an_unknown_backbone_is_a_half():
    model = TaskClassifier(Backbone())
    assert (model.normalize.mean.item(), model.normalize.std.item()) == (0.5, 0.5)


def test_normalisation_is_not_in_the_state_dict():
    assert not [name for name in TaskClassifier(Backbone()).state_dict() if "normalize" in name]


def test_statistics_for_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match="mean has 2 values, the backbone takes 3 channels"):
        TaskClassifier(Backbone(), mean=[0.5, 0.5])


def test_integer_images_other_than_uint8_are_refused():
    with pytest.raises(TypeError, match=r"found torch.int64"):
        TaskClassifier(Backbone()).features(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.int64))


def test_grey_images_are_repeated_to_the_channels_of_the_backbone():
    model = TaskClassifier(Backbone()).eval()
    grey = images_of(Stripes(channels=1))
    torch.testing.assert_close(model.features(grey), model.features(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("name", "args", "channels"),
    [("test_vit", {"in_chans": 1, "img_size": SIZE}, 1), ("test_resnet", None, 3), ("test_efficientnet", None, 1)],
)
def test_timm_models_fit_and_predict(name, args, channels):
    model, data = TaskClassifier(name, args), Stripes(channels=channels)
    fit(model, data)
    assert model(images_of(data)).shape == (48, 3)
    assert accuracy(model, data) > 0.5


def test_head_fits_timm_models_whose_features_are_projected_before_the_classifier():
    model = TaskClassifier("mobilenetv3_small_050", lr=0.0)
    fit(model, Stripes(count=6), limit_train_batches=1)
    assert model.heads["stripes"].in_features == model.features(images_of(Stripes(count=2))).shape[1]
    assert model.heads["stripes"].in_features != model.backbone.num_features


def test_feature_size_of_a_module_without_num_features_is_measured():
    model = TaskClassifier(nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten()))
    fit(model, Stripes())
    assert model.heads["stripes"].in_features == 4 * 4 * 4


def test_an_unknown_timm_name_is_answered_with_close_ones():
    with pytest.raises(ValueError, match="no model 'resnet_18'.*resnet18"):
        TaskClassifier("resnet_18")


@pytest.mark.parametrize("more", [{"backbone_args": {"in_chans": 1}}, {"pretrained": True}])
def test_arguments_for_timm_with_a_module_are_refused(more):
    with pytest.raises(ValueError, match="the backbone is a Backbone"):
        TaskClassifier(Backbone(), **more)


def test_backbone_starts_from_the_weights_of_a_checkpoint(tmp_path):
    source = Backbone()
    save_file(source.state_dict() | {"fc.weight": torch.zeros(2, 6)}, tmp_path / "w.safetensors")
    assert same(copy_of(TaskClassifier(Backbone(), checkpoint=tmp_path / "w.safetensors").backbone), copy_of(source))


def test_a_timm_backbone_starts_from_the_weights_of_a_timm_model_with_its_classifier(tmp_path):
    source = timm.create_model("test_resnet", num_classes=5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = TaskClassifier("test_resnet", checkpoint=str(tmp_path / "w.pth")).eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(
        model.backbone(images), source.eval().forward_head(source.forward_features(images), pre_logits=True)
    )


def test_load_from_checkpoint_gives_the_same_predictions(tmp_path):
    data = Stripes()
    model = TaskClassifier("test_resnet", lr=0.02)
    fit(model, Stripes("other", 4))
    fit(model, data).save_checkpoint(tmp_path / "a.ckpt")
    loaded = TaskClassifier.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert loaded.lr == 0.02
    assert list(loaded.heads) == ["other", "stripes"]
    assert not any(parameter.requires_grad for parameter in loaded.heads.parameters())
    model.eval()
    torch.testing.assert_close(loaded(images_of(data), "stripes"), model(images_of(data)), rtol=0, atol=0)


def test_load_from_checkpoint_takes_a_module_backbone_from_the_caller(tmp_path):
    model = TaskClassifier(Backbone())
    fit(model, Stripes()).save_checkpoint(tmp_path / "a.ckpt")
    loaded = TaskClassifier.load_from_checkpoint(tmp_path / "a.ckpt", backbone=Backbone())
    assert same(copy_of(loaded), copy_of(model))


def test_load_from_checkpoint_does_not_need_the_file_of_initial_weights(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    model = TaskClassifier("test_resnet", checkpoint=tmp_path / "w.safetensors")
    fit(model, Stripes()).save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "w.safetensors").unlink()
    assert same(copy_of(TaskClassifier.load_from_checkpoint(tmp_path / "a.ckpt")), copy_of(model))


def test_resumed_fit_keeps_the_probe_and_equals_an_uninterrupted_one(tmp_path):
    class Ordered(Stripes):
        def train_dataloader(self):
            return DataLoader(self.data, batch_size=16)

    start = copy_of(TaskClassifier(Backbone()))

    def run(**more):
        model = TaskClassifier(Backbone(), lr=0.05)
        model.load_state_dict(start)
        model.backbone.dropout.p = 0.0
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saver])
        trainer.fit(model, datamodule=Ordered(), **more)
        return copy_of(model)

    uninterrupted = run()
    assert same(run(ckpt_path=tmp_path / "epoch=0.ckpt"), uninterrupted)


def test_test_and_validate_log_the_exact_accuracy_over_uneven_batches():
    model, data = TaskClassifier(Backbone(), lr=0.0), Stripes(count=50)
    fit(model, data)
    data.data.tensors[1][40:] = 2 - data.data.tensors[1][40:]  # the last, smaller batch is one of mistakes
    trainer = fit(model, data)
    expected = pytest.approx(accuracy(model, data))
    assert 0.3 < accuracy(model, data) < 0.95
    assert trainer.callback_metrics["val/acc"] == expected
    assert "train/loss" in trainer.callback_metrics
    assert make_trainer().test(model, datamodule=data, verbose=False)[0]["test/acc"] == expected
    assert make_trainer().validate(model, datamodule=data, verbose=False)[0]["val/acc"] == expected


def test_testing_a_checkpoint_with_a_fresh_module_creates_its_heads(tmp_path):
    model, data = TaskClassifier(Backbone()), Stripes()
    fit(model, data).save_checkpoint(tmp_path / "a.ckpt")
    result = make_trainer().test(TaskClassifier(Backbone()), data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert result[0]["test/acc"] == pytest.approx(accuracy(model, data))


def test_testing_a_task_without_a_head_is_an_error_that_lists_the_heads():
    model = TaskClassifier(Backbone())
    fit(model, Stripes("a"))
    with pytest.raises(ValueError, match=r"no head for task 'b'; there are heads for \['a'\]"):
        make_trainer().test(model, datamodule=Stripes("b"), verbose=False)


def test_calibration_step_reaches_the_backbone_and_not_the_frozen_head():
    model, data = TaskClassifier(Backbone()), Stripes()
    fit(model, data)
    model.zero_grad(set_to_none=True)
    model.calibration_step(data.data[:8], "stripes").backward()
    assert all(parameter.grad.any() for parameter in model.backbone.norm.parameters())
    assert all(parameter.grad is None for parameter in model.heads.parameters())


def test_prediction_step_returns_the_logits_of_the_named_task_and_the_targets():
    model, data = TaskClassifier(Backbone()), Stripes("a", 3)
    fit(model, data)
    fit(model, Stripes("b", 4))
    model.eval()
    logits, targets = model.prediction_step(data.data[:8], "a")
    torch.testing.assert_close(logits, model.heads["a"](model.features(data.data[:8][0])))
    assert torch.equal(targets, data.data[:8][1])


@pytest.mark.parametrize("count", [2, 8])
def test_images_alone_are_predicted_as_with_labels(count):
    model, data = TaskClassifier(Backbone()), Stripes("a")
    fit(model, data)
    model.eval()
    images, labels = data.data[:count]
    expected, _ = model.prediction_step((images, labels), "a")
    for batch in (images, [images]):
        logits, targets = model.prediction_step(batch, "a")
        assert torch.equal(logits, expected)
        assert targets is None


@pytest.mark.parametrize("loss", ["logits", "entropy"])
def test_merging_by_predictions_needs_images_only(loss, small_stream):
    merged = []
    for samples_of in (lambda data: data.data, images_of, lambda data: TensorDataset(images_of(data))):
        torch.manual_seed(0)
        model = TaskClassifier(Backbone())
        merge = ContinualMergeCallback(calibration_size=12, calibration=CalibrationOptions(loss=loss))
        for seed, name in enumerate("ab"):
            data = Stripes(name, seed=seed)
            merge.calibration_data[name] = samples_of(data)
            fit(model, data, callbacks=[merge])
        assert merge.report.merges[1].gradient_evaluations > 0
        merged.append(copy_of(model))
    assert same(merged[0], merged[1])
    assert same(merged[0], merged[2])


def test_the_loss_on_labels_refuses_images_alone_before_training(small_stream):
    model, data, merge = TaskClassifier(Backbone(), lr=0.1), Stripes("a"), ContinualMergeCallback(calibration_size=12)
    before = copy_of(model.backbone)
    merge.calibration_data["a"] = images_of(data)
    with pytest.raises(ValueError, match=r"task 'a' have no labels.*`loss: logits`"):
        fit(model, data, callbacks=[merge])
    assert same(copy_of(model.backbone), before)


def test_biases_and_normalisation_parameters_do_not_decay():
    model = TaskClassifier("test_resnet", weight_decay=0.3)
    groups = fit(model, Stripes()).optimizers[0].param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    named = dict(model.backbone.named_parameters())
    assert decay.keys() == set(named.values())
    expected = {
        name: 0.0 if "bn" in name or "bias" in name or value.ndim == 1 else 0.3 for name, value in named.items()
    }
    assert {name: decay[value] for name, value in named.items()} == expected


def test_learning_rate_cycles_once_over_the_run():
    class Record(L.Callback):
        def __init__(self):
            self.lr = []

        def on_train_batch_start(self, trainer, *_):
            self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])

    record = Record()
    fit(TaskClassifier(Backbone(), lr=0.1), Stripes(), max_epochs=4, callbacks=[record])
    assert len(record.lr) == 12
    assert record.lr[0] == pytest.approx(0.1 / 25)
    assert max(record.lr) == pytest.approx(0.1, rel=0.05)
    assert record.lr[-1] < 1e-4


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        fit(TaskClassifier(Backbone()), Stripes(), max_epochs=-1)


def test_a_datamodule_without_the_task_is_refused_naming_both_attributes():
    class Nameless(L.LightningDataModule):
        num_classes = 3

    with pytest.raises(
        ValueError, match=r"`task_name` and `num_classes`.*task_name=None and num_classes=3 on Nameless"
    ):
        fit(TaskClassifier(Backbone()), Nameless())
    with pytest.raises(ValueError, match="on NoneType"):
        make_trainer().fit(TaskClassifier(Backbone()), Stripes().train_dataloader())


def test_a_head_of_another_size_is_refused():
    model = TaskClassifier(Backbone())
    fit(model, Stripes("a", 3))
    with pytest.raises(ValueError, match="head of task 'a' has 3 classes, the datamodule has 5"):
        fit(model, Stripes("a", 5))


@pytest.mark.parametrize("name", ["digits.v2", "", "keys"])
def test_a_name_that_cannot_name_a_head_is_refused(name):
    with pytest.raises(ValueError, match=f"Task name {name!r} cannot name a head"):
        fit(TaskClassifier(Backbone()), Stripes(name))


@pytest.mark.parametrize("head", ["probe", "train"])
def test_labels_outside_the_head_are_refused_before_training(head):
    data = Stripes("shifted", 3, offset=1)
    data.data.targets = data.data.tensors[1].tolist()
    with pytest.raises(
        ValueError, match=r"Task 'shifted' has .* label 3, but its head has 3 classes \(labels 0 to 2\)"
    ):
        fit(TaskClassifier(Backbone(), head=head), data, num_sanity_val_steps=0)


def test_labels_outside_the_head_are_found_without_targets_when_the_probe_is_fitted():
    with pytest.raises(ValueError, match="Task 'shifted' has a training sample of label 3"):
        fit(TaskClassifier(Backbone()), Stripes("shifted", 3, offset=1), num_sanity_val_steps=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_fit(precision):
    model, data = TaskClassifier(Backbone()), Stripes()
    trainer = fit(model, data, precision=precision)
    assert trainer.callback_metrics["val/acc"] > 0.5


def test_probe_is_fitted_under_the_precision_of_the_trainer():
    class Projected(Backbone):
        def forward(self, images):
            return super().forward(images) @ torch.eye(6)

    fit(TaskClassifier(Projected()), Stripes(), precision="bf16-true", num_sanity_val_steps=0)


def test_fast_dev_run_fits():
    fit(TaskClassifier(Backbone()), Stripes(), fast_dev_run=True)


def test_heads_are_what_is_specific_to_a_task():
    model = TaskClassifier(Backbone())
    fit(model, Stripes())
    trained = [name for name, _ in model.named_parameters() if not name.startswith(TaskClassifier.task_specific)]
    assert trained == [f"backbone.{name}" for name, _ in model.backbone.named_parameters()]


def test_every_argument_can_be_written_in_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])
    (tmp_path / "config.yaml").write_text(
        f"""
model:
  backbone: {{class_path: torch.nn.Flatten}}
  checkpoint: null
  head: train
  lr: 0.01
  weight_decay: 0.1
  freeze_batch_norm: false
  mean: [0.4]
  std: [0.2]
trainer: {{logger: false, accelerator: cpu, default_root_dir: {tmp_path}}}
"""
    )
    cli = LightningCLI(
        TaskClassifier, run=False, seed_everything_default=False, args=["--config", str(tmp_path / "config.yaml")]
    )
    assert isinstance(cli.model.backbone, nn.Flatten)
    assert (cli.model.trains_head, cli.model.lr, cli.model.freeze_batch_norm) == (True, 0.01, False)
    assert cli.model.normalize.mean.item() == pytest.approx(0.4)


def test_a_checkpoint_of_the_command_line_loads_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])
    args = ["--model.backbone=test_vit", f"--model.backbone_args={{img_size: {SIZE}}}", "--trainer.accelerator=cpu"]
    cli = LightningCLI(TaskClassifier, run=False, seed_everything_default=False, args=[*args, "--trainer.logger=false"])
    fit(cli.model, Stripes()).save_checkpoint(tmp_path / "a.ckpt")
    assert same(copy_of(TaskClassifier.load_from_checkpoint(tmp_path / "a.ckpt")), copy_of(cli.model))


def test_every_argument_is_documented():
    for name in list(inspect.signature(TaskClassifier.__init__).parameters)[1:]:
        assert f"        {name}: " in f"    {TaskClassifier.__doc__}", name


def test_in_the_tangent_space_the_weights_train_and_the_expansion_point_stays_the_base_model():
    model = TaskClassifier(Backbone(), lr=0.02, tangent=True)
    base = copy_of(model.backbone.model)
    fit(model, Stripes("a"), max_epochs=3)
    first = copy_of(model.backbone.model)
    fit(model, Stripes("b", seed=1), max_epochs=3)
    assert same(copy_of(model.backbone.origin), base)
    assert not torch.equal(first["conv.weight"], base["conv.weight"])
    assert not torch.equal(model.backbone.model.conv.weight, first["conv.weight"])
    assert torch.equal(model.backbone.model.norm.running_mean, base["norm.running_mean"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"backbone.model.{name}" for name, _ in model.backbone.model.named_parameters()]


def test_in_the_tangent_space_mean_weights_give_mean_features():
    model, images = TaskClassifier(Backbone(), lr=0.02, tangent=True), images_of(Stripes())
    states, features = [], []
    for task in ("a", "b"):
        fit(model, Stripes(task, seed=len(states)), max_epochs=3)
        states.append(copy_of(model.backbone))
        features.append(model.features(images).detach())
    model.backbone.load_state_dict({name: (value + states[1][name]) / 2 for name, value in states[0].items()})
    torch.testing.assert_close(model.features(images), (features[0] + features[1]) / 2)
    assert (features[0] - features[1]).abs().max() > 0.01


def test_a_checkpoint_and_weights_loaded_later_are_the_expansion_point_of_the_first_fit(tmp_path):
    first, second = Backbone(), Backbone()
    save_file(first.state_dict(), tmp_path / "w.safetensors")
    model = TaskClassifier(Backbone(), checkpoint=tmp_path / "w.safetensors", tangent=True, lr=0.0)
    assert same(copy_of(model.backbone.origin), copy_of(first))
    model.backbone.model.load_state_dict(second.state_dict())
    fit(model, Stripes("a"))
    model.backbone.model.load_state_dict(first.state_dict())
    fit(model, Stripes("b"))
    assert same(copy_of(model.backbone.origin), copy_of(second))


def test_pretraining_trains_the_network_itself_and_makes_it_the_expansion_point():
    model, plain = TaskClassifier(Backbone(), tangent=True), TaskClassifier(Backbone())
    model.backbone.model.load_state_dict(plain.backbone.state_dict())
    options = {"accelerator": "cpu", "enable_progress_bar": False}
    for each in (model, plain):
        torch.manual_seed(1)
        pretrain(each, Stripes("source"), max_epochs=2, **options)
    assert same(copy_of(model.backbone.model), copy_of(plain.backbone))
    assert same(copy_of(model.backbone.origin), copy_of(plain.backbone))
    assert not any(module.training for module in model.backbone.model.modules())


def test_a_linearised_classifier_loads_from_its_checkpoint(tmp_path):
    model, data = TaskClassifier("test_resnet", tangent=True, lr=0.02), Stripes()
    fit(model, data).save_checkpoint(tmp_path / "a.ckpt")
    loaded = TaskClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(loaded.backbone, Linearized)
    assert same(copy_of(loaded), copy_of(model))
    fit(loaded, Stripes("b", seed=1))
    assert same(copy_of(loaded.backbone.origin), copy_of(model.backbone.origin))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_linearised_transformer_trains_in_low_precision(precision):
    model = TaskClassifier("test_vit", {"img_size": SIZE}, tangent=True, lr=1e-3)
    trainer = fit(model, Stripes(), precision=precision, max_epochs=2)
    assert model.heads["stripes"].in_features == 64
    assert trainer.callback_metrics["val/acc"] > 0.5

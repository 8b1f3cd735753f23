import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_odem.stream.evaluation import score
from lightning_odem.stream.evaluation_data import evaluation_data


def loader(seed=0, size=20, batch_size=6):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)
    return DataLoader(TensorDataset(*data), batch_size=batch_size)


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class WithPrediction(Classifier):
    """Predicts the class below the highest score, so that ``forward`` would give another accuracy."""

    ids = False

    def prediction_step(self, batch, task):
        assert task == "digits"
        assert not torch.is_grad_enabled()
        scores = self(batch[0]).roll(-1, dims=1)
        return (scores.argmax(1) if self.ids else scores), batch[1]


class Classes(WithPrediction):
    ids = True


class AtTheEnd(L.Callback):
    def __init__(self, function):
        self.function = function

    def on_train_end(self, trainer, pl_module):
        self.result = self.function(trainer, pl_module)


def in_fit(function, module=None, datamodule=None, val=None, **settings):
    """What ``function(trainer, module)`` returns at the end of a real fit of one step."""
    callback = AtTheEnd(function)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, callbacks=[callback], **quiet | settings)
    trainer.fit(module or Classifier(), None if datamodule else loader(), val, datamodule=datamodule)
    return callback.result


def measure(data, module=None, **settings):
    return in_fit(lambda trainer, module: score(module.eval(), data, "digits").value, module, **settings)


def by_hand(module, batches, shift=0):
    pairs = [(scores.argmax(), target) for x, y in batches for scores, target in zip(module(x), y, strict=True)]
    return sum((int(scores) - shift) % 3 == int(target) for scores, target in pairs) / len(pairs)


@pytest.mark.parametrize(("kind", "shift"), [(Classifier, 0), (WithPrediction, 1), (Classes, 1)])
def test_accuracy_is_the_fraction_counted_by_hand(kind, shift):
    module = kind()
    assert measure(loader(), module) == by_hand(module, loader(), shift)


def test_data_without_targets_have_no_accuracy():
    class Unlabelled(Classifier):
        def prediction_step(self, batch, task):
            return self(batch[0]), None

    with pytest.raises(ValueError, match=r"batch of task 'digits' has no targets.*\(inputs, targets\)"):
        measure(loader(), Unlabelled())


def test_accuracy_can_be_measured_again():
    module = Classifier()
    values = in_fit(lambda trainer, module: [score(module, loader(), "digits").value for _ in range(2)], module)
    assert values[0] == values[1] == by_hand(module, loader())


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (2, 2), (100, 4), (1.0, 4), (0.5, 2), (0.8, 3)])
def test_the_trainers_limit_of_test_batches_applies(limit, batches):
    module = Classifier()
    expected = by_hand(module, list(loader())[:batches])
    assert measure(loader(), module, limit_test_batches=limit) == expected


class Data(L.LightningDataModule):
    """Loaders by stage; those of ``test`` exist after ``setup("test")`` only."""

    def __init__(self, **loaders):
        super().__init__()
        if "test" in loaders:
            self.test_dataloader = lambda: loaders["test"] if self.stage == "test" else None
        if "val" in loaders:
            self.val_dataloader = lambda: loaders["val"]

    def setup(self, stage):
        self.stage = stage

    def train_dataloader(self):
        return loader()


def find(module=None, **settings):
    found = in_fit(lambda trainer, module: evaluation_data(trainer, "digits"), module, **settings)
    return found and found.batches


def with_loaders(**loaders):
    module = Classifier()
    for name, value in loaders.items():
        setattr(module, f"{name}_dataloader", lambda value=value: value)
    return module


TEST, VAL, OTHER = loader(1), loader(2), loader(3)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"datamodule": Data(test=TEST, val=VAL)}, TEST),
        ({"datamodule": Data(test=TEST), "module": with_loaders(test=OTHER)}, TEST),
        ({"datamodule": Data(val=VAL), "module": with_loaders(test=TEST)}, TEST),
        ({"module": with_loaders(test=TEST), "val": VAL}, TEST),
        ({"datamodule": Data(val=VAL)}, VAL),
        ({"module": with_loaders(val=VAL)}, VAL),
        ({"val": VAL}, VAL),
        ({"val": VAL, "module": with_loaders(val=OTHER)}, VAL),
        ({"datamodule": Data()}, None),
        ({}, None),
    ],
)
def test_test_data_come_before_validation_data(case, expected):
    """The modules have no ``validation_step``: Lightning itself would not load validation data for them."""
    assert find(**case) is expected


def test_a_module_with_a_validation_step_is_measured_on_the_same_data():
    class Validating(Classifier):
        def validation_step(self, batch, batch_idx):
            pass

    assert find(Validating(), val=VAL) is VAL


def test_one_loader_in_a_container_is_the_loader():
    for container in ([VAL], (VAL,), {"any": VAL}, CombinedLoader([VAL], "sequential")):
        assert find(val=container) is VAL


def test_of_several_loaders_the_one_with_the_tasks_name_measures_it():
    assert find(val={"letters": OTHER, "digits": VAL}) is VAL
    assert find(datamodule=Data(test={"digits": TEST, "letters": OTHER})) is TEST


@pytest.mark.parametrize(
    ("loaders", "which", "expected"),
    [([OTHER, VAL], 1, VAL), ({"a": VAL, "digits": OTHER}, "a", VAL), (VAL, 0, VAL), ((OTHER, VAL), 0, OTHER)],
)
def test_the_loader_that_the_user_chose_measures_the_task(loaders, which, expected):
    found = in_fit(lambda trainer, module: evaluation_data(trainer, "digits", which), val=loaders)
    assert found.batches is expected


@pytest.mark.parametrize(
    ("settings", "which", "message"),
    [
        ({"val": [VAL, OTHER]}, None, "Task 'digits' has 2 validation dataloaders, 0, 1, and none of the task's name"),
        ({"val": {"a": VAL, "b": OTHER}}, None, r"'a', 'b', and none .* as a dict with the key 'digits'"),
        ({"val": [VAL, OTHER]}, 2, r"no loader 2: .* set evaluation_data\['digits'\] of the callback to one of 0, 1"),
        ({"datamodule": Data(test=[TEST, OTHER])}, None, "Task 'digits' has 2 test dataloaders"),
    ],
)
def test_several_loaders_of_which_none_is_the_tasks_are_refused(settings, which, message):
    with pytest.raises(ValueError, match=message):
        in_fit(lambda trainer, module: evaluation_data(trainer, "digits", which), **settings)


@pytest.mark.parametrize(("limit", "batches"), [(1.0, 4), (2, 2), (0.5, 2)])
@pytest.mark.parametrize("stage", ["test", "val"])
def test_the_limit_of_the_datas_own_stage_applies(stage, limit, batches):
    module = Classifier()
    settings = {f"limit_{stage}_batches": limit, "datamodule": Data(**{stage: loader(1)})}
    value = in_fit(
        lambda trainer, module: score(module, evaluation_data(trainer, "digits"), "digits").value, module, **settings
    )
    assert value == by_hand(module, list(loader(1))[:batches])


def test_no_loader_in_a_list_is_no_data():
    assert find(val=[]) is None


@pytest.mark.parametrize("data", [[], loader(size=0)])
def test_data_without_a_sample_are_an_error(data):
    with pytest.raises(ValueError, match="Task 'digits' has no sample to measure an accuracy on"):
        measure(data)


def test_data_of_unknown_length_can_be_measured():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    module = Classifier()
    assert measure(DataLoader(Stream(), batch_size=6), module) == by_hand(module, loader())
    two = measure(DataLoader(Stream(), batch_size=6), module, limit_test_batches=2)
    assert two == by_hand(module, list(loader())[:2])


def test_transfer_hooks_apply():
    class Negating(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return -batch[0], batch[1]

    module = Classifier()
    assert measure(loader(), module, datamodule=Negating()) == by_hand(module, [(-x, y) for x, y in loader()])


def test_batches_that_are_no_pairs_need_a_prediction_step():
    with pytest.raises(ValueError, match=r"needs batches \(inputs, targets\), got Tensor. Give Classifier a method"):
        measure([torch.zeros(2, 4)])


def test_a_forward_with_other_arguments_than_inputs_needs_a_prediction_step_too():
    class Two(Classifier):
        def forward(self, inputs, targets):
            return super().forward(inputs)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(*batch), batch[1])

    expected = r"Two gives no predictions for the inputs of task 'digits' alone: .*targets.*Give Two a method"
    with pytest.raises(ValueError, match=expected) as refusal:
        measure(loader(), Two())
    assert all(way in str(refusal.value) for way in ("prediction_step(batch, task)", "monitor=", "evaluate=False"))


@pytest.mark.parametrize(
    ("predictions", "targets"),
    [((5,), (4,)), ((5, 3), (4,)), ((5, 3, 2), (5,)), ((5, 3), (5, 3)), ((), (1,))],
)
def test_predictions_that_do_not_fit_the_targets_are_refused(predictions, targets):
    module = Classifier()
    module.prediction_step = lambda batch, task: (torch.zeros(predictions), torch.zeros(targets, dtype=torch.long))
    with pytest.raises(ValueError, match=r"Predictions of Classifier on task 'digits' must be scores \[B, C\]"):
        measure(loader(), module)


LONG, WIDE = torch.long, torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("predictions", "targets", "found"),
    [
        (torch.zeros(5), torch.zeros(5, dtype=LONG), r"float32 \[5\] and targets int64 \[5\]"),
        (torch.zeros(5).half(), torch.zeros(5, dtype=torch.bool), r"float16 \[5\] and targets bool \[5\]"),
        (torch.zeros(5), torch.zeros(5), r"float32 \[5\] and targets float32 \[5\]"),
        (torch.zeros(5, dtype=LONG), torch.zeros(5), r"int64 \[5\] and targets float32 \[5\]"),
        (WIDE, torch.zeros(5).double(), r"float32 \[5, 3\] and targets float64 \[5\]"),
        (WIDE[:, :1], torch.zeros(5, dtype=LONG), r"float32 \[5, 1\] and targets int64 \[5\]"),
        (WIDE[:, :1].long(), torch.zeros(5, dtype=LONG), r"int64 \[5, 1\] and targets int64 \[5\]"),
        (WIDE[:, :0], torch.zeros(5, dtype=LONG), r"float32 \[5, 0\] and targets int64 \[5\]"),
        ({"logits": WIDE}, torch.zeros(5, dtype=LONG), r"dict and targets int64 \[5\]"),
    ],
)
def test_what_is_no_class_is_refused_with_what_was_found_and_the_remedy(predictions, targets, found):
    module = Classifier()
    module.prediction_step = lambda batch, task: (predictions, targets)
    with pytest.raises(ValueError, match=rf"Classifier on task 'digits' .*, got {found}") as caught:
        measure(loader(), module)
    assert "prediction_step(batch, task) -> (predictions, targets)" in str(caught.value)


@pytest.mark.parametrize(
    "kind", [torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint64]
)
def test_classes_may_be_booleans_and_integers_of_any_width(kind):
    module, batch = Classifier(), (torch.zeros(4, 4), torch.tensor([0, 1, 1, 0]))
    predictions = torch.tensor([0, 1, 0, 0])
    module.prediction_step = lambda batch, task: (predictions.to(kind), batch[1])
    assert measure([batch], module) == 0.75
    module.prediction_step = lambda batch, task: (predictions, batch[1].to(kind))
    assert measure([batch], module) == 0.75


def test_accuracies_are_those_of_the_trainers_precision():
    module = Classifier()
    seen = []
    module.prediction_step = lambda batch, task: seen.append(module(batch[0]).dtype) or (module(batch[0]), batch[1])
    measure(loader(), module, precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}

"""Whole streams of modules that are not plain: compiled, checkpointed, tied, frozen, parametrised, of many dtypes."""

import os
import shutil

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from toy import Classifier, Incoming, Task, close, everything, fit, make_trainer, same, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.parameters.vector import canonical_name

pytestmark = pytest.mark.usefixtures("small_stream")

METHODS = ("ode", "ode_paper", "average")


def stream(module, method="average", tasks=2, prepare=None, **options):
    """Fit tasks one after the other; ``prepare(module, number)`` gives what the Trainer gets each time."""
    merge, incoming = ContinualMergeCallback(method, **options), Incoming()
    for number in range(tasks):
        given = module if prepare is None else prepare(module, number)
        make_trainer(incoming, merge).fit(given, datamodule=Task(number))
    return merge, incoming


def plain(tensors):
    return {canonical_name(name): value for name, value in tensors.items()}


def assert_mean(module, incoming):
    """Every parameter is the mean of the incoming models', computed in fp64."""
    for name, parameter in module.named_parameters():
        mean = torch.stack([model[name].double() for model in incoming.models]).mean(0)
        torch.testing.assert_close(parameter.double(), mean, rtol=1e-6, atol=1e-7)


def calibration_loss(module):
    """The loss of two tasks that are in the buffer as a whole, by hand."""
    module.eval()
    with torch.no_grad():
        sets = [Task(number).train_set.tensors for number in range(2)]
        losses = [nn.functional.cross_entropy(module(inputs), targets).item() for inputs, targets in sets]
    module.train()
    return sum(losses) / 2


def reference(method, **options):
    module = Classifier(batch_norm=True)
    merge, _ = stream(module, method, tasks=3, dirpath="reference", **options)
    return module, merge


# -------------------------------------------------------------------------------------------------------------- compile


def whole_first(module, number):
    return torch.compile(module, backend="eager") if number == 0 else module


def whole_later(module, number):
    return torch.compile(module, backend="aot_eager") if number else module


def in_place(module, number):
    if number == 0:
        module.compile(backend="eager")
    return module


def part_now_and_then(module, number):
    part = getattr(module.body, "_orig_mod", module.body)
    module.body = torch.compile(part, backend="aot_eager") if number % 2 else part
    return module


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prepare", [whole_first, whole_later, in_place, part_now_and_then])
def test_compiling_some_tasks_and_not_others_changes_nothing(prepare, method):
    options = {"batch_norm": "recalibrate", "exclude": ["head"]}
    expected, same_merge = reference(method, **options)
    module = Classifier(batch_norm=True)
    prepared = {}

    def once(module, number):  # a module compiled twice is no LightningModule
        given = prepare(module, number) if number not in prepared else prepared[number]
        if isinstance(given, torch._dynamo.OptimizedModule):
            prepared.update(dict.fromkeys(range(3), given))
        return given

    merge, _ = stream(module, method, tasks=3, prepare=once, **options)
    assert close(plain(everything(module)), everything(expected), atol=1e-5)
    assert merge.report.accuracy == same_merge.report.accuracy
    assert not [name for name in merge.state_dict()["merged"] if "_orig_mod" in name]
    fresh = Classifier(batch_norm=True)
    merge.load_task(fresh, "task_3")
    assert same(everything(fresh), plain(everything(module)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="torch's own code does not compile so")
def test_code_generated_by_inductor_is_merged_as_eager_code():
    expected, module = Classifier(), Classifier()
    stream(expected, "ode", dirpath="reference")
    compiled = torch.compile(module)
    merge, _ = stream(module, "ode", prepare=lambda module, number: compiled)
    assert merge.report.merges[1].path["scale"]
    assert close(weights(module), weights(expected), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- checkpointing


class Checkpointed(Classifier):
    def __init__(self, use_reentrant):
        super().__init__(batch_norm=True)
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        hidden = self.body[0](inputs)
        return self.head(checkpoint(self.body[1:], hidden, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("method", ["ode", "ode_paper"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_merge(use_reentrant, method):
    """Batch-norm statistics are updated twice in training then, so the merges are of given models."""
    models = stream(Classifier(batch_norm=True), dirpath="models")[1].models
    merged, slopes = [], []
    for module in (Classifier(batch_norm=True), Checkpointed(use_reentrant)):
        merge = ContinualMergeCallback(method, dirpath=f"run-{len(merged)}")

        class Replay(L.Callback):
            def on_train_end(self, trainer, pl_module, merge=merge):
                pl_module.load_state_dict(models[len(merge.report.tasks)])

        for number in range(2):
            fit(module, Task(number), Replay(), merge)
        merged.append(everything(module))
        slopes.append(merge.report.merges[1].path["alignment"])
    assert same(*merged)
    assert slopes[0] == slopes[1]


# ------------------------------------------------------------------------------------------------------ tied and frozen


class Tied(Classifier):
    """The head's weight is that of the body's first layer, under two names."""

    def __init__(self):
        super().__init__()
        self.body[0], self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.body[0].weight


class Reused(Classifier):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first

    def forward(self, inputs):
        return self.head(self.again(self.first(self.body(inputs))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Tied, Reused])
def test_a_parameter_of_two_names_is_merged_once(kind, method):
    module = kind()
    merge, incoming = stream(module, method)
    tied = {"body.0.weight": "head.weight"} if kind is Tied else {"first.weight": "again.weight"}
    for name, other in tied.items():
        assert module.get_parameter(name) is module.get_parameter(other)
        assert other not in merge.state_dict()["merged"]
    if method == "average":
        assert_mean(module, incoming)


@pytest.mark.parametrize("exclude", [["head"], ["head.weight"], ["body"]])
def test_a_tied_parameter_excluded_by_one_name_only_is_refused_before_training(exclude):
    module = Tied()
    before = weights(module)
    message = "body.0.weight and head.weight are one parameter of Tied.*Exclude all of its names or none"
    with pytest.raises(ValueError, match=message):
        stream(module, exclude=exclude)
    assert same(weights(module), before)


def test_a_tied_parameter_excluded_by_all_its_names_belongs_to_the_task():
    module = Tied()
    merge, incoming = stream(module, exclude=["*.weight"])
    assert set(merge.state_dict()["task_parameters"]["task_1"]) == {"body.0.weight"}
    merge.load_task(module, "task_1")
    assert torch.equal(module.head.weight, incoming.models[0]["head.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_parts_frozen_in_one_task_and_trained_in_the_next_are_merged(method):
    module = Classifier()

    def thaw(module, number):
        module.body.requires_grad_(number != 0)
        module.head.requires_grad_(number != 2)
        return module

    merge, incoming = stream(module, method, tasks=3, prepare=thaw)
    first, second, third = incoming.models
    base = incoming.starts[0]
    assert same({"w": first["body.0.weight"]}, {"w": base["body.0.weight"]})
    assert same({"w": third["head.weight"]}, {"w": base["head.weight"]})
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, True, False, False]
    if method == "average":
        assert_mean(module, incoming)


@pytest.mark.parametrize("method", METHODS)
def test_a_module_that_is_all_frozen_is_refused_before_training(method):
    class Frozen(Classifier):
        trained = False

        def training_step(self, batch, batch_idx):
            self.trained = True
            return super().training_step(batch, batch_idx).requires_grad_()

    module = Frozen().requires_grad_(False)
    with pytest.raises(ValueError, match="No trainable parameter of Frozen is left to merge: of 4 parameters"):
        stream(module, method)
    assert not module.trained


# ------------------------------------------------------------------------------------------------- what layers are like


class With(Classifier):
    """A classifier with something in front of it."""

    def __init__(self, build, **options):
        super().__init__(**options)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            build(self)

    def forward(self, inputs):
        return super().forward(self.front(inputs) if hasattr(self, "front") else inputs)


def front(layer):
    return lambda: With(lambda module: setattr(module, "front", layer()))


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Conv2d(3, 1, 2), nn.Flatten()
    ).to(memory_format=torch.channels_last)


def strided():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.randn(8, 4).t()[:, ::2])
    return layer


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.several = nn.ParameterList([torch.ones(4), torch.zeros(1)])
        self.named = nn.ParameterDict({"number": torch.tensor(0.5), "empty": torch.zeros(0, 3)})

    def forward(self, inputs):
        return inputs * self.several[0] * self.named["number"] + self.several[1] + self.named["empty"].sum()


LAYERS = {
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "sync_batch_norm": lambda: nn.SyncBatchNorm(4),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "layer_norm": lambda: nn.LayerNorm(4),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "hooked_weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "channels_last": convolutions,
    "strided": strided,
    "lists_and_scalars": Lists,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_layers_of_every_kind_are_merged_in_their_parameters(name, method):
    module = front(LAYERS[name])()
    layout = [(parameter.shape, parameter.stride(), parameter.dtype) for parameter in module.parameters()]
    merge, incoming = stream(module, method)
    assert [(parameter.shape, parameter.stride(), parameter.dtype) for parameter in module.parameters()] == layout
    assert all(value.isfinite().all() for value in weights(module).values())
    if method == "average":
        assert_mean(module, incoming)
    else:
        assert merge.report.merges[1].loss_after == pytest.approx(calibration_loss(module), rel=1e-5)
    fresh = front(LAYERS[name])()
    merge.load_task(fresh, "task_2")
    assert same(everything(fresh), everything(module))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_parametrised_weights_have_the_names_of_their_parts():
    merge, _ = stream(front(LAYERS["weight_norm"])())
    original = {f"front.parametrizations.weight.original{number}" for number in (0, 1)}
    assert original < merge.state_dict()["merged"].keys()
    assert "front.weight" not in merge.state_dict()["merged"]


def test_a_module_built_by_configure_model_is_merged():
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            self.parts = self.body, self.head
            self.body = self.head = None

        def configure_model(self):
            if self.body is None:
                self.body, self.head = self.parts

    module, expected = Late(), Classifier()
    stream(module, "ode")
    stream(expected, "ode", dirpath="reference")
    assert same(weights(module), weights(expected))


# --------------------------------------------------------------------------------------------------------------- dtypes


class Mixed(Classifier):
    """Parameters in fp64, bf16 and fp32."""

    def __init__(self):
        super().__init__()
        self.body.double()
        self.middle = nn.Linear(8, 8).bfloat16()

    def forward(self, inputs):
        return self.head(self.middle(self.body(inputs.double()).bfloat16()).float())


def test_each_parameter_is_merged_to_the_accuracy_of_its_dtype():
    module = Mixed()
    _, incoming = stream(module, tasks=3)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64, torch.bfloat16, torch.float32}
    first, second, third = ({name: value.double() for name, value in model.items()} for model in incoming.models)
    for name, parameter in module.named_parameters():
        # All in fp64, with one rounding of the parameter per merge, but in half precision in the end alone.
        kept = torch.promote_types(parameter.dtype, torch.float32)
        halfway = ((first[name] + second[name]) / 2).to(kept).double()
        expected = (halfway + (third[name] - halfway) / 3).to(parameter.dtype)
        torch.testing.assert_close(parameter, expected, rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize("method", ["ode", "ode_paper"])
def test_a_flow_goes_through_parameters_of_several_dtypes(method):
    module = Mixed()
    merge, _ = stream(module, method)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64, torch.bfloat16, torch.float32}
    assert merge.report.merges[1].loss_after == pytest.approx(calibration_loss(module), rel=1e-3)


def many_kinds(module):
    module.register_buffer("count", torch.arange(3))
    module.register_buffer("mask", torch.tensor([True, False, True]))
    module.register_buffer("wave", torch.ones(3, dtype=torch.complex64))
    module.table = nn.Parameter(torch.arange(3), requires_grad=False)
    module.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)


@pytest.mark.parametrize("method", METHODS)
def test_integers_booleans_and_complex_constants_stay_as_they_are(method):
    module, expected = With(many_kinds), Classifier()
    merge, _ = stream(module, method)
    stream(expected, method, dirpath="reference")
    assert same(
        {name: value for name, value in weights(module).items() if name in weights(expected)}, weights(expected)
    )
    constants = [module.count, module.mask, module.wave, module.table, module.phase]
    built = With(many_kinds)
    assert all(map(torch.equal, constants, [built.count, built.mask, built.wave, built.table, built.phase]))
    assert merge.state_dict()["merged"]["phase"].dtype == torch.complex64


def test_an_integer_parameter_that_a_task_changes_becomes_the_incoming_models():
    class Counting(Classifier):
        def __init__(self):
            super().__init__()
            self.steps, self.fits = nn.Parameter(torch.tensor(0), requires_grad=False), 0

        def on_train_start(self):
            self.fits += 1

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.steps += self.fits

    module = Counting()
    _, incoming = stream(module)
    assert incoming.models[0]["steps"] != incoming.models[1]["steps"]
    assert module.steps == incoming.models[1]["steps"]


def complex_scale(module):
    module.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    module.forward = lambda inputs: Classifier.forward(module, inputs) * module.phase.real + module.phase.imag


@pytest.mark.parametrize("method", METHODS)
def test_complex_parameters_are_refused_before_training_unless_excluded(method):
    module = With(complex_scale)
    before = weights(module)
    with pytest.raises(ValueError, match="phase of With is complex.*view_as_complex.*exclude"):
        stream(module, method, dirpath="refused")
    assert same(weights(module), before)
    merge, incoming = stream(module, method, exclude=["phase"])
    assert torch.equal(merge.state_dict()["task_parameters"]["task_1"]["phase"], incoming.models[0]["phase"])
    assert incoming.models[0]["phase"].is_complex()


# ------------------------------------------------------------------------------------------------------------ no values


class Lazy(Classifier):
    def __init__(self):
        super().__init__()
        self.body[0] = nn.LazyLinear(8)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:.*uninitialized parameters")
def test_lazy_parameters_are_refused_until_a_batch_has_given_them_values():
    module, (inputs, _) = Lazy(), Task(0).train_set.tensors
    merge = ContinualMergeCallback()
    with pytest.raises(ValueError, match="lazy parameter body.0.weight of Lazy has no values yet.*sample batch"):
        fit(module, Task(0), merge)
    assert merge.report.tasks == []
    module(inputs)
    for number in range(2):
        fit(module, Task(number), merge)
    assert merge.report.tasks == ["task_1", "task_2"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:.*uninitialized parameters")
def test_lightnings_sanity_check_gives_lazy_parameters_their_values():
    merge = ContinualMergeCallback()
    fit(Lazy(), Task(0), merge, num_sanity_val_steps=1)
    assert merge.report.tasks == ["task_1"]


def test_a_module_without_memory_is_refused_by_lightning_before_training():
    module, merge = Classifier(), ContinualMergeCallback()
    module.head.to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        fit(module, Task(0), merge)
    assert merge.report.tasks == []

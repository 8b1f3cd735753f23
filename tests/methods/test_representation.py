import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from toy import Classifier, Task, make_trainer

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.calibration.loss import ModuleLoss
from lightning_odem.calibration.task_data import TaskData
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods import (
    AverageMerge,
    LinearInterpolation,
    MergeContext,
    MergeMethod,
    MergeResult,
    PaperODEMerge,
)
from lightning_odem.methods.needs import SecondMoments, Snapshots, TrainingData
from lightning_odem.methods.representation import RepresentationCorrection
from lightning_odem.methods.second_moment import SecondMomentMerge
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.parameters.vector import ParameterVector
from lightning_odem.stream.attach import attached
from lightning_odem.stream.merging import merging
from lightning_odem.stream.trace import TrainingTrace

D = 3


class Net(L.LightningModule):
    """Features by two layers; the head has no part in them."""

    def __init__(self, seed=0, linear=False):
        super().__init__()
        torch.manual_seed(seed)
        hidden = nn.Identity() if linear else nn.Tanh()
        self.first = nn.Identity() if linear else nn.Linear(D, 5)
        self.last = nn.Linear(D if linear else 5, 2)
        self.body = nn.Sequential(self.first, hidden, self.last)
        self.head = nn.Linear(2, 4)

    def features(self, inputs):
        return self.body(inputs)

    def forward(self, inputs):
        return self.head(self.features(inputs))


def make_batches(count=6, size=8, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return [(scale * torch.randn(size, D, generator=generator), torch.zeros(size).long()) for _ in range(count)]


def make_context(module, batches, exclude=("head",), **more):
    """The module's merged parameters and its real task data."""
    trainer = make_trainer()
    trainer.predict(module, DataLoader(torch.zeros(1, D)))  # attaches the module
    module.eval()
    vector = ParameterVector(module, exclude)
    data = TaskData(vector, module, "new", batches)
    return MergeContext(vector.names, [tuple(shape) for shape in vector.shapes], needed={TrainingData: data}, **more)


def read(module):
    return ParameterVector(module, ("head",)).read()


def mean_difference(theta, target, context, power=1):
    """Mean of |z(theta) - z(target)|^power over all training samples and features."""
    data, total = context[TrainingData], []
    for batch in data:
        values = [data.evaluate(point, lambda batch=batch: data.features(batch)) for point in (theta, target)]
        total.append((values[0] - values[1]).abs() ** power)
    return float(torch.cat(total).mean())


def by_hand(before, merged, batches, names, *, lr, loss, weight_decay, clip):
    """The correction of modules: all but the named parameters frozen, torch's own optimizer."""
    merged.requires_grad_(False)
    trained = [parameter.requires_grad_() for name, parameter in merged.named_parameters() if name in names]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    for inputs, _ in batches:
        optimizer.zero_grad()
        difference = merged.features(inputs) - before.features(inputs).detach()
        (difference.abs() if loss == "l1" else difference.square()).mean().backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    return read_all(merged)


def read_all(module):
    return torch.cat([p.detach().flatten() for name, p in module.named_parameters() if not name.startswith("head")])


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("layers", [None, ["first"], ["first", "last"]])
@pytest.mark.parametrize("clip", [1.0, 0.01])
def test_the_corrected_model_is_that_of_a_training_loop_on_modules(loss, layers, clip):
    settings = {"lr": 1e-2, "loss": loss, "weight_decay": 0.3, "clip": clip}
    before, incoming, batches = Net(0), Net(1), make_batches()
    merged, average = read(before), Net(2)
    context = make_context(Net(3), batches)
    theta = RepresentationCorrection("average", layers, **settings).merge(merged, read(incoming), 0.4, context).theta
    with torch.no_grad():
        for target, old, new in zip(average.parameters(), before.parameters(), incoming.parameters(), strict=True):
            target.copy_(old.lerp(new, 0.4))
    names = [f"{layer}.weight" for layer in layers or ["last"]]
    torch.testing.assert_close(theta, by_hand(before, average, batches, names, **settings))


@pytest.mark.parametrize(("loss", "power"), [("l1", 1), ("l2", 2)])
def test_features_come_closer_to_those_of_the_model_before(loss, power):
    before, incoming, batches = read(Net(0)), read(Net(1)), make_batches(60)
    context = make_context(Net(), batches)
    method = RepresentationCorrection("average", lr=1e-2, loss=loss, weight_decay=0.0)
    corrected = method.merge(before.clone(), incoming, 0.5, context).theta
    merged = AverageMerge().merge(before.clone(), incoming, 0.5, context).theta
    distances = [mean_difference(point, before, context, power) for point in (corrected, merged)]
    assert distances[0] < 0.6 * distances[1]


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_a_linear_feature_is_corrected_to_the_weights_of_the_model_before(loss):
    """Features W x + b: with the biases equal, W of the model before is the only optimum."""
    before, incoming = read(Net(0, linear=True)), read(Net(1, linear=True))
    context = make_context(Net(linear=True), make_batches(300))
    incoming[-2:] = before[-2:]
    method = RepresentationCorrection("average", lr=3e-3, loss=loss, weight_decay=0.0)
    corrected = method.merge(before.clone(), incoming, 0.5, context).theta
    torch.testing.assert_close(corrected, before, rtol=0, atol=2e-2)
    assert (incoming - before).abs().max() > 0.2


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, {"last.weight"}), (["first"], {"first.weight"}), (["*"], {"first.weight", "last.weight"})],
)
def test_only_the_selected_matrices_move(layers, expected):
    before, incoming = read(Net(0)), read(Net(1))
    context = make_context(Net(), make_batches())
    merged = LinearInterpolation().merge(before.clone(), incoming, 0.5, context).theta
    corrected = (
        RepresentationCorrection("interpolation", layers, lr=1e-3).merge(before.clone(), incoming, 0.5, context).theta
    )
    sizes = [torch.Size(shape).numel() for shape in context.shapes]
    pieces = zip(context.names, merged.split(sizes), corrected.split(sizes), strict=True)
    assert {name for name, old, new in pieces if not torch.equal(old, new)} == expected


def test_learning_rate_0_and_time_0_give_exactly_what_the_wrapped_method_gives():
    before, incoming = read(Net(0)), read(Net(1))
    context = make_context(Net(), make_batches())
    average = AverageMerge().merge(before.clone(), incoming, 0.4, context).theta
    assert torch.equal(
        RepresentationCorrection("average", lr=0).merge(before.clone(), incoming, 0.4, context).theta, average
    )
    method = RepresentationCorrection("average", lr=1e-2)
    assert torch.equal(method.merge(before.clone(), incoming, 0.0, context).theta, before)
    assert context[TrainingData].sample_gradients == 0
    assert torch.equal(method.start(incoming, context).theta, incoming)


def test_the_incoming_model_stays_as_it_is_also_where_the_wrapped_method_returns_it():
    class Overwrite(MergeMethod):
        def merge(self, merged, incoming, t, context):
            merged.zero_()
            return MergeResult(incoming)

    before, incoming = read(Net(0)), read(Net(1))
    context, kept = make_context(Net(), make_batches(100)), incoming.clone()
    corrected = RepresentationCorrection(Overwrite(), lr=1e-2).merge(before.clone(), incoming, 0.5, context).theta
    assert torch.equal(incoming, kept)
    assert mean_difference(corrected, before, context) < 0.7 * mean_difference(incoming, before, context)


def merge_two(method, batch_norm=False):
    """What a merge makes of two models: the merged and the incoming one, the module, the record and its loss."""
    module, buffer = Classifier(batch_norm=batch_norm), CalibrationBuffer(16)
    before = {name: value + 0.5 for name, value in take_snapshot(module).items()}
    incoming = take_snapshot(module)
    tasks = {name: Task(number) for number, name in enumerate(("old", "new"))}
    for name, task in tasks.items():
        buffer.add(name, task.train_set.tensors)
    with attached(module):
        calibration = CalibrationSet(buffer, ModuleLoss(module))
        trace = TrainingTrace(list(tasks["new"].train_dataloader()))
        settings = {"merged": before, "base": {}, "calibration": calibration, "trace": trace}
        with merging(module, method, task="new", t=0.5, **settings) as made:
            pass
        vector = ParameterVector(module)
        loss = calibration.objective(vector).loss(vector.read())
    return before, incoming, take_snapshot(module), made.record, loss


@pytest.mark.parametrize("operating_time", [0.25, "search"])
def test_the_operating_time_that_the_wrapped_method_chose_is_that_of_the_merge(operating_time):
    flow = PaperODEMerge(operating_time=operating_time)
    *_, plain, _ = merge_two(flow, batch_norm=True)
    before, incoming, merged, record, _ = merge_two(RepresentationCorrection(flow, lr=1e-3), batch_norm=True)
    assert record.t == plain.t == record.path["t"][-1] != 0.5
    for name in ("body.1.running_mean", "body.1.running_var"):
        torch.testing.assert_close(merged[name], before[name].lerp(incoming[name], record.t))


def test_the_loss_recorded_at_the_end_of_the_path_is_that_of_the_corrected_model():
    *_, plain, _ = merge_two(PaperODEMerge())
    *_, record, loss = merge_two(RepresentationCorrection(PaperODEMerge(), lr=0.1))
    assert record.loss_after == record.path["loss"][-1] == pytest.approx(loss, rel=1e-6)
    assert record.loss_after != pytest.approx(plain.loss_after, rel=1e-4)
    assert record.path["loss"][:-1] == plain.path["loss"][:-1]


def test_nothing_is_corrected_where_the_wrapped_method_stays_at_the_merged_model():
    flow = PaperODEMerge(operating_time=0.0)
    before, _, merged, record, _ = merge_two(RepresentationCorrection(flow, lr=0.1))
    assert record.t == 0.0
    assert record.sample_gradients == merge_two(flow)[-2].sample_gradients
    assert all(torch.equal(merged[name], before[name]) for name in before)


def test_the_pass_is_counted_once_per_sample():
    context = make_context(Net(), make_batches(5, 8))
    RepresentationCorrection("average").merge(read(Net(0)), read(Net(1)), 0.5, context)
    assert context[TrainingData].sample_gradients == 40


def test_needs_state_and_snapshots_are_those_of_the_wrapped_method():
    wrapped = SecondMomentMerge()
    wrapped.needs = (SecondMoments(), Snapshots(3))
    method = RepresentationCorrection(wrapped)
    assert method.needs == (SecondMoments(), Snapshots(3), TrainingData())
    method.start(torch.zeros(2), MergeContext(["w"], [(2,)], needed={SecondMoments: torch.ones(2)}))
    assert method.state_dict().keys() == {"moments"}
    method.load_state_dict({})
    assert wrapped.state_dict() == {}


def test_a_model_without_a_weight_matrix_is_refused():
    context = make_context(Net(), make_batches(), exclude=("head", "*.weight"))
    size = sum(torch.Size(shape).numel() for shape in context.shapes)
    with pytest.raises(ValueError, match=r"no weight matrix to correct among the merged parameters: first.bias"):
        RepresentationCorrection("average").merge(torch.zeros(size), torch.ones(size), 0.5, context)


def test_a_pattern_that_matches_nothing_is_refused():
    context = make_context(Net(), make_batches())
    with pytest.raises(ValueError, match=r"layers=\['visual'\] matches no weight matrix"):
        RepresentationCorrection("average", ["visual"]).merge(read(Net(0)), read(Net(1)), 0.5, context)


def test_features_that_are_not_finite_are_an_error():
    context = make_context(Net(linear=True), make_batches(scale=float("inf")))
    with pytest.raises(NonFiniteLossError, match="The representation loss is (nan|inf)"):
        RepresentationCorrection("average").merge(read(Net(0, linear=True)), read(Net(1, linear=True)), 0.5, context)


@pytest.mark.parametrize(
    "arguments", [{"lr": -1}, {"loss": "l3"}, {"weight_decay": -1}, {"clip": 0}, {"layers": "last"}]
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RepresentationCorrection("average", **arguments)

"""Checkpoints folded into a stream by the command are merged as the callback would have merged them."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import Classifier, Incoming, Task, everything, fit, same

from lightning_odem import ContinualMergeCallback
from lightning_odem.cli.command_line import main
from lightning_odem.cli.into import merge_into
from lightning_odem.methods import IsotropicMerge, MergeMethod, MergeResult, TiesMerge
from lightning_odem.stream.store import StreamLock

pytestmark = pytest.mark.usefixtures("small_stream")

NAMES = ["shoes", "hats", "sweater", "socks"]


class Grouped(Classifier):
    """A module with all that names of tensors do not tell: groups, frozen weights, floating buffers, own heads."""

    task_specific = ("head",)

    def __init__(self):
        super().__init__(batch_norm=True)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
            self.still = nn.Linear(4, 4).requires_grad_(False)
        self.tied = nn.Linear(4, 8)
        self.tied.weight = self.body[0].weight
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, inputs):
        mixed = self.conv(self.still(inputs)[..., None].expand(-1, -1, 3)).mean(-1)
        return self.head(self.body(mixed) + 0.1 * self.tied(inputs))

    def training_step(self, batch, batch_idx):
        self.largest = torch.maximum(self.largest, batch[0].max())
        return super().training_step(batch, batch_idx)


def stream(*names, dirpath="streams/shop", make=Classifier, **options):
    """A stream of tasks, whose fine-tuned models lie in ``fine_tuned``; returns its callback."""
    torch.manual_seed(0)
    module, incoming = make(), Incoming()
    merge = ContinualMergeCallback(dirpath=dirpath, calibration_size=12, **options)
    Path("fine_tuned").mkdir(exist_ok=True)
    for name in names:
        fit(module, Task(NAMES.index(name), name), incoming, merge)
        torch.save({"state_dict": incoming.models[-1]}, f"fine_tuned/{name}.ckpt")
    return merge


def read(dirpath="streams/shop", **options):
    return ContinualMergeCallback(dirpath=dirpath, calibration_size=12, **options)


@pytest.mark.parametrize("make", [Classifier, Grouped])
@pytest.mark.parametrize(
    "method",
    ["average", IsotropicMerge(), IsotropicMerge(0.5, layers=["body"]), TiesMerge(), "opcm"],
    ids=["average", "isotropic", "some-layers", "ties", "opcm"],
)
def test_the_stream_is_that_of_the_callback_bit_by_bit(method, make, capsys):
    expected = stream(*NAMES[:3], dirpath="whole", method=method, make=make)
    stream(*NAMES[:2], method=method, make=make)
    main(["merge", "fine_tuned/sweater.ckpt", "--into", "streams/shop"])
    written = Path("streams/shop/merged-03-sweater.ckpt").absolute()
    assert f"Merged sweater into streams/shop. Merged weights: {written}" in capsys.readouterr().out
    found = read(method=method)
    state, wanted = found.state_dict(), expected.state_dict()
    assert same(state["merged"], wanted["merged"])
    assert state["task_parameters"].keys() == wanted["task_parameters"].keys()
    assert all(same(state["task_parameters"][name], own) for name, own in wanted["task_parameters"].items())
    for name in ("names", "settings", "fingerprints", "layout"):
        assert state[name] == wanted[name]
    assert same(*(torch.load(run / written.name)["state_dict"] for run in (written.parent, Path("whole"))))
    for merge in (found, expected):
        merge.load_task(module := make(), "sweater")
        merge.weights_of_sweater = everything(module)
    assert same(found.weights_of_sweater, expected.weights_of_sweater)


@pytest.mark.parametrize("method", ["average", "isotropic"])
def test_a_training_goes_on_with_it_and_the_task_can_be_taken_out(method):
    stream(*NAMES[:2], method=method)
    stream(*NAMES[:3], dirpath="whole", method=method)
    merge_into(["fine_tuned/sweater.ckpt"], "streams/shop", weights=[2.0])
    report = read(method=method).report
    assert report.tasks == NAMES[:3]
    assert report.weights == [1.0, 1.0, 2.0]
    assert report.merges[-1].t == 0.5
    assert all(map(math.isnan, report.accuracy[-1]))
    merge = read(method=method)
    fit(Classifier(), Task(3, "socks"), merge)
    assert merge.report.tasks == NAMES
    main(["remove", "streams/shop", "sweater", "--checkpoint=fine_tuned/sweater.ckpt"])
    assert read(method=method).report.tasks == ["shoes", "hats", "socks"]


def test_a_callback_in_memory_goes_on_with_it():
    merge = stream(*NAMES[:2], method="average")
    stream(*NAMES[:3], dirpath="whole", method="average")
    merge_into(["fine_tuned/sweater.ckpt"], "streams/shop")
    fit(Classifier(), Task(3, "socks"), merge)
    assert merge.report.tasks == NAMES


def test_several_checkpoints_are_merged_in_order_or_none_of_them():
    expected = stream(*NAMES, dirpath="whole", method="isotropic")
    stream(*NAMES[:2], method="isotropic")
    broken = torch.load("fine_tuned/socks.ckpt")
    broken["state_dict"]["head.weight"][0, 0] = math.nan
    torch.save(broken, "fine_tuned/broken.ckpt")
    with pytest.raises(ValueError, match="holds infinite or NaN values in head.weight"):
        merge_into(["fine_tuned/sweater.ckpt", "fine_tuned/broken.ckpt"], "streams/shop")
    assert read(method="isotropic").report.tasks == NAMES[:2]
    merge_into(["fine_tuned/sweater.ckpt", "fine_tuned/socks.ckpt"], "streams/shop")
    assert same(read(method="isotropic").state_dict()["merged"], expected.state_dict()["merged"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hats.ckpt", "--into=streams/shops"], "There is no stream in streams/shops"),
        (["hats.ckpt", "--into=streams/shop"], "streams/shop holds a task 'hats' already"),
        (["boots.ckpt", "--into=streams/shop"], "There is no file of weights at boots.ckpt"),
        (["wide.ckpt", "--into=streams/shop"], "head.weight: (3, 8) in the stream's model, (5, 8) in the wide.ckpt"),
        (["deep.ckpt", "--into=streams/shop"], "body.4.weight: in the deep.ckpt model only"),
        (["nan.ckpt", "--into=streams/shop"], "the incoming model holds infinite or NaN values in head.bias"),
        (["hats.ckpt", "--into=streams/shop", "--tasks=[new]", "--weights=[-1]"], "weights"),
        (["hats.ckpt", "--into=streams/shop", "--tasks=[new]", "--exclude=[boots]"], "matches nothing in hats.ckpt"),
        (["hats.ckpt", "--into=streams/shop", "--output=a.safetensors"], "--output"),
    ],
)
def test_what_cannot_be_done_ends_with_a_message_and_leaves_the_stream(arguments, message, capsys):
    stream("shoes", "hats", method="average")
    model = torch.load("fine_tuned/hats.ckpt")["state_dict"]
    torch.save(model, "hats.ckpt")
    torch.save(Classifier(classes=5).state_dict(), "wide.ckpt")
    torch.save({**model, "body.4.weight": torch.randn(8, 8)}, "deep.ckpt")
    torch.save({**model, "head.bias": torch.tensor([math.inf, 0.0, 0.0])}, "nan.ckpt")
    files = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["merge", *arguments])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(Path().rglob("*")) == files


def test_a_stream_in_use_is_left_alone(capsys):
    stream("shoes", method="average")
    lock = StreamLock("streams/shop/stream/lock")
    lock.acquire()
    with pytest.raises(SystemExit):
        main(["merge", "fine_tuned/shoes.ckpt", "--into=streams/shop", "--tasks=[hats]"])
    lock.release()
    assert "in use by" in capsys.readouterr().err


class Drifting(MergeMethod):
    """A method whose setting is no plain value."""

    def __init__(self, factor=None):
        self.factor = torch.ones(()) if factor is None else factor

    def merge(self, merged, incoming, t, context):
        return MergeResult(merged.lerp_(incoming, t * float(self.factor)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ode"}, "needs calibration samples"),
        ({"method": "average", "batch_norm": "recalibrate"}, "are estimated on its samples"),
        ({"method": Drifting()}, "Drifting"),
    ],
)
def test_a_stream_that_needs_more_than_tensors_is_refused_with_the_way_out(options, message):
    stream("shoes", make=lambda: Classifier(batch_norm=True), **options)
    with pytest.raises(ValueError, match=message) as refused:
        merge_into(["fine_tuned/shoes.ckpt"], "streams/shop", tasks=["hats"])
    assert "Merge the task in the callback" in str(refused.value)


def test_statistics_that_are_kept_stay():
    def make():
        return Classifier(batch_norm=True)

    expected = stream(*NAMES[:3], dirpath="whole", make=make, method="average", batch_norm="keep")
    stream(*NAMES[:2], make=make, method="average", batch_norm="keep")
    merge_into(["fine_tuned/sweater.ckpt"], "streams/shop")
    assert same(read(method="average").state_dict()["merged"], expected.state_dict()["merged"])


def test_what_a_task_keeps_for_itself_is_needed_and_a_new_name_for_it_is_given_by_exclude():
    stream("shoes", make=Grouped, method="average")
    model = torch.load("fine_tuned/shoes.ckpt")["state_dict"]
    torch.save({name: tensor for name, tensor in model.items() if name != "head.bias"}, "headless.ckpt")
    with pytest.raises(ValueError, match="headless.ckpt lacks head.bias, which each task of the stream keeps"):
        merge_into(["headless.ckpt"], "streams/shop")
    torch.save({**model, "heads.hats": torch.ones(3)}, "hats.ckpt")
    with pytest.raises(ValueError, match="heads.hats: in the hats.ckpt model only"):
        merge_into(["hats.ckpt"], "streams/shop")
    merge_into(["hats.ckpt"], "streams/shop", exclude=["heads"])
    assert torch.equal(read(method="average").state_dict()["task_parameters"]["hats"]["heads.hats"], torch.ones(3))


def test_a_stream_of_an_earlier_version_is_refused_until_the_callback_has_merged_into_it():
    merge = stream("shoes", "hats", method="average")
    state = merge._directory.read(merge._state)
    state.layout = {}
    merge._directory.rewrite(state)
    with pytest.raises(ValueError, match="was merged by an earlier version"):
        merge_into(["fine_tuned/hats.ckpt"], "streams/shop", tasks=["sweater"])
    fit(Classifier(), Task(2, "sweater"), read(method="average"))
    merge_into(["fine_tuned/hats.ckpt"], "streams/shop", tasks=["scarf"])
    assert read(method="average").report.tasks == [*NAMES[:3], "scarf"]

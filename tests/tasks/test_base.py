from functools import partial

import pytest
from lightning.pytorch import Trainer

from lightning_odem.tasks import DigitsStream, TaskStream


@pytest.fixture
def make_stream(make_task):
    def make(**options):
        return TaskStream({name: partial(make_task, name) for name in ("a", "b", "c", "d")}, **options)

    return make


def test_a_stream_is_a_sequence_of_tasks_with_names(make_stream):
    stream = make_stream()
    assert len(stream) == 4
    assert stream.names == [task.task_name for task in stream] == ["a", "b", "c", "d"]
    assert stream[1] is stream["b"]
    assert stream[-1] is stream["d"]


def test_tasks_select_and_order(make_stream):
    assert make_stream(tasks=["d", "a"]).names == ["d", "a"]


def test_only_the_tasks_taken_are_built(make_task):
    stream = TaskStream({"good": partial(make_task, "good"), "bad": partial(make_task, weight=-1)}, tasks=["good"])
    assert stream.names == ["good"]


def test_order_seed_shuffles_repeatably(make_stream):
    orders = [tuple(make_stream(order_seed=seed).names) for seed in range(10)]
    assert orders == [tuple(make_stream(order_seed=seed).names) for seed in range(10)]
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert len(set(orders)) > 3


def test_weights_are_one_unless_given(make_stream):
    assert [task.task_weight for task in make_stream(weights={"c": 2.5})] == [1.0, 1.0, 2.5, 1.0]


def test_common_arguments_reach_every_task(make_stream):
    options = {"batch_size": 5, "num_workers": 0, "train_transform": abs, "seed": 7}
    for task in make_stream(**options):
        assert {name: getattr(task, name) for name in options} == options


@pytest.mark.parametrize("options", [{"tasks": ["a", "e"]}, {"weights": {"e": 1.0}}])
def test_an_unknown_name_lists_the_valid_ones(make_stream, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: 'e'. Valid names: 'a', 'b', 'c', 'd'"):
        make_stream(**options)


@pytest.mark.parametrize("tasks", [[], ["a", "b", "a"]])
def test_no_task_or_one_twice_is_refused(make_stream, tasks):
    with pytest.raises(ValueError, match="at least one task and none twice"):
        make_stream(tasks=tasks)


def test_a_missing_key_names_the_tasks_of_the_stream(make_stream):
    with pytest.raises(KeyError, match="'c'.*'a', 'b'"):
        make_stream(tasks=["a", "b"])["c"]
    with pytest.raises(IndexError):
        make_stream(tasks=["a", "b"])[2]


def test_a_stream_of_one_task_stands_for_that_task(make_stream, fit):
    stream = make_stream(tasks=["b"], weights={"b": 3.0}, batch_size=8)
    model = fit(stream)
    assert len(model.seen) == 2
    assert (stream.task_name, stream.task_weight, stream.num_classes) == ("b", 3.0, 2)
    assert stream.calibration_dataset() is stream[0].calibration_dataset()


def test_fitting_a_stream_of_several_tasks_says_what_to_do(make_stream, recorder):
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"has 4: 'a', 'b', 'c', 'd'.*fit_tasks.*tasks=\[\"a\"\]"):
        trainer.fit(recorder(), datamodule=make_stream())


@pytest.mark.parametrize("attribute", ["task_name", "task_weight", "num_classes"])
def test_a_stream_of_several_tasks_has_no_single_value(make_stream, attribute):
    with pytest.raises(ValueError, match="One fit trains one task"):
        getattr(make_stream(), attribute)


def test_a_stream_has_no_pretraining_task_by_default(make_stream):
    assert make_stream().pretraining is None


class TestCommandLine:
    """Streams as the ``data`` of a LightningCLI."""

    @pytest.fixture
    def run(self, recorder):
        from lightning.pytorch.cli import LightningCLI

        def run(config):
            trainer = {"fast_dev_run": True, "accelerator": "cpu", "enable_progress_bar": False}
            cli = LightningCLI(
                recorder,
                TaskStream,
                subclass_mode_data=True,
                seed_everything_default=0,
                args={"subcommand": "fit", "fit": {"trainer": trainer, "data": config}},
            )
            return cli.datamodule

        return run

    def test_a_transform_is_given_by_class_path(self, run):
        crop = {"class_path": "torchvision.transforms.v2.RandomCrop", "init_args": {"size": 32, "padding": 2}}
        flip = {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip"}
        compose = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [crop, flip]}}
        arguments = {"tasks": ["rotated"], "weights": {"rotated": 2}, "train_transform": compose, "seed": 3}
        stream = run({"class_path": "lightning_odem.tasks.DigitsStream", "init_args": arguments})
        assert isinstance(stream, DigitsStream)
        assert (stream.task_weight, stream[0].seed) == (2.0, 3)
        assert [type(step).__name__ for step in stream[0].train_transform.transforms] == [
            "RandomCrop",
            "RandomHorizontalFlip",
        ]

    def test_a_misspelt_common_argument_is_refused(self, run, capsys):
        with pytest.raises(SystemExit):
            run({"class_path": "lightning_odem.tasks.DigitsStream", "init_args": {"batchsize": 3}})
        assert "batchsize" in capsys.readouterr().err

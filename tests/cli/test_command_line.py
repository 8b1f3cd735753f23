import contextlib
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import lightning as L
import pytest
import torch
import yaml
from scripts import run_script

from lightning_odem import ContinualMergeCallback, PaperODEMerge
from lightning_odem.cli.command_line import ContinualCLI, main
from lightning_odem.methods import method_name, resolve_method
from lightning_odem.studies import Comparison
from lightning_odem.studies.trainer import ContinualTrainer
from lightning_odem.tasks import SUITE_8, SUITE_14, SUITE_20, DigitsStream, TaskStream

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
BACKBONES = ["clip_vit_b32.yaml", "clip_vit_b16.yaml", "clip_vit_l14.yaml"]
TABLES = ["clip_table1_b32.yaml", "clip_table1_b16.yaml", "clip_table1_l14.yaml"]
COMPARISONS = [
    "compare_eight_tasks.yaml",
    "sweep_step_size.yaml",
    "sweep_calibration_size.yaml",
    "compare_gradients.yaml",
]
SUITES = {"suite_8.yaml": SUITE_8, "suite_14.yaml": SUITE_14, "suite_20.yaml": SUITE_20}
SMALL = ["--model=TaskClassifier", "--model.backbone=test_vit", "--model.backbone_args={in_chans: 1, img_size: 32}"]
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DIGITS = ["--data=DigitsStream", "--data.tasks=[rotated, inverted]"]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))  # as for a command run in the root of the repository


def merge_callback(cli):
    return next(found for found in cli.trainer.callbacks if isinstance(found, ContinualMergeCallback))


def test_every_config_is_covered_here():
    streams = {"digits.yaml", "eight_tasks.yaml", "hcmm.yaml", "text.yaml"}
    assert {path.name for path in CONFIGS.iterdir()} == {
        *streams,
        *BACKBONES,
        *SUITES,
        *COMPARISONS,
        *TABLES,
        "compare_recursion.yaml",
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", [*COMPARISONS, "compare_recursion.yaml"])
def test_comparisons_run_on_a_stream(config, tmp_path):
    limits = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--pretrain_epochs=1", "--orders=1"]
    limits += ["--trainer.limit_test_batches=1", "--calibration_sizes=[16]", "--dirpath=here", *QUIET]
    stream = ["--config", str(CONFIGS / "digits.yaml"), "--data.tasks=[rotated, inverted]"]
    main(["compare", *stream, "--config", str(CONFIGS / config), *limits])
    methods = yaml.safe_load((CONFIGS / config).read_text())["methods"]
    assert Comparison.load("here").methods == list(methods)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
    assert yaml.safe_load(Path("here/compare.yaml").read_text())["orders"] == 1


@pytest.mark.slow
def test_a_second_comparison_uses_the_models_of_the_first(tmp_path):
    limits = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--pretrain_epochs=1", "--orders=1"]
    limits += ["--calibration_sizes=[16]", *QUIET]
    for options in (["--dirpath=first"], ["--dirpath=second", "--models=first", "--methods=[average, magmax]"]):
        main(["compare", "--config", str(CONFIGS / "digits.yaml"), "--pretrain_epochs=1", *limits, *options, *QUIET])
    assert len(list(Path("first/fine_tuned").glob("*.json"))) == 5 + 1
    assert len(list(Path("first/cells").iterdir())) == 3
    assert not Path("second/fine_tuned").exists()
    assert Comparison.load("second").methods == ["average", "magmax"]


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("table", TABLES)
def test_the_tables_of_the_paper_reach_their_data(table, suite, tmp_path):
    pytest.importorskip("transformers")
    configs = ["--config", str(CONFIGS / table), "--config", str(CONFIGS / suite), "--print_config"]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *configs])
    assert ended.value.code == 0


@pytest.mark.parametrize("config", [*COMPARISONS, *TABLES])
def test_configurations_that_compare_have_algorithm_1_among_their_methods(config):
    methods = yaml.safe_load((CONFIGS / config).read_text())["methods"]
    made = []
    for method in methods.values() if isinstance(methods, dict) else methods:
        options = {} if isinstance(method, str) else method.get("init_args", {})
        made.append(resolve_method(method) if isinstance(method, str) else locate(method["class_path"])(**options))
    names = [method_name(method) for method in made]
    assert "ode_paper" in names
    if config == "sweep_step_size.yaml":
        assert names == ["average"] + ["ode_paper"] * 5
        labels = [label.rpartition(" ")[2] for label in methods]
        assert [float(label) for label in labels[1:]] == [method.step_size for method in made[1:]]
    else:
        assert "ode" in names


@pytest.mark.slow
def test_the_digits_run_through_their_stream_and_write_a_report(tmp_path):
    limits = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--pretrain_epochs=1", *DIGITS, *QUIET[1:]]
    cli = main(["fit_tasks", "--config", str(CONFIGS / "digits.yaml"), *limits])
    assert merge_callback(cli).dirpath == tmp_path / "merge_runs" / "version_0"
    assert [path.name for path in tmp_path.iterdir()] == ["merge_runs"]
    saved = yaml.safe_load((tmp_path / "merge_runs" / "version_0" / "config.yaml").read_text())
    assert saved["data"]["init_args"]["tasks"] == ["rotated", "inverted"]
    assert (tmp_path / "merge_runs" / "version_0" / "report.json").exists()


@pytest.mark.slow
def test_the_digits_run_in_a_trial():
    cli = main(["fit_tasks", "--config", str(CONFIGS / "digits.yaml"), "--trainer.fast_dev_run=true"])
    assert merge_callback(cli).report.tasks == DigitsStream().names


@pytest.mark.slow
def test_the_eight_tasks_run_on_files_of_their_format(tmp_path):
    import numpy as np

    tasks = yaml.safe_load((CONFIGS / "eight_tasks.yaml").read_text())["data"]["init_args"]["tasks"]
    generator = np.random.default_rng(0)
    for task in tasks:
        splits = {}
        for split in ("train", "val", "test"):
            splits[f"{split}_images"] = generator.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
            splits[f"{split}_labels"] = (np.arange(12) % 3).astype(np.uint8)[:, None]
        np.savez(tmp_path / f"{task}.npz", **splits)
    cli = main(
        ["fit_tasks", "--config", str(CONFIGS / "eight_tasks.yaml"), "--data.root", str(tmp_path)]
        + ["--trainer.fast_dev_run=true", "--model.backbone.depth=8"]
    )
    assert merge_callback(cli).report.tasks == tasks


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_of_the_paper_reach_their_data(backbone, suite, tmp_path):
    # Without the datasets all that can be seen is that every option is accepted and the data is asked for.
    configs = ["--config", str(CONFIGS / backbone), "--config", str(CONFIGS / suite)]
    cpu = ["--trainer.accelerator=cpu", "--trainer.precision=32", "--model.pretrained=false"]
    tiny = ["--model.backbone=test_vit", f"--data.root={tmp_path}"]
    with pytest.raises(ValueError, match=r"(?s)Task 'sun397': .*SUN397 does not exist"):
        main(["fit_tasks", *configs, *cpu, *tiny, "--data.download=false"])


@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_are_those_of_the_package(suite):
    assert yaml.safe_load((CONFIGS / suite).read_text())["data"]["init_args"]["tasks"] == SUITES[suite]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_timm_publishes_the_clip_towers(backbone):
    import timm

    name = yaml.safe_load((CONFIGS / backbone).read_text())["model"]["init_args"]["backbone"]
    assert name in timm.list_pretrained()


def test_one_task_can_be_fitted_with_plain_fit_and_a_callback_from_the_command_line():
    callback = ["--trainer.callbacks=ContinualMergeCallback", "--trainer.callbacks.calibration_size=20"]
    one = ["--data=DigitsStream", "--data.tasks=[noisy]", "--trainer.limit_train_batches=1", "--trainer.max_epochs=1"]
    cli = main(["fit", *SMALL, *one, *callback, *QUIET, "--trainer.enable_checkpointing=false"])
    assert merge_callback(cli).report.tasks == ["noisy"]


def test_plain_fit_on_several_tasks_points_to_fit_tasks():
    with pytest.raises(ValueError, match="fit_tasks"):
        main(["fit", *SMALL, *DIGITS, *QUIET, "--trainer.fast_dev_run=true"])


def test_the_method_and_its_options_come_from_yaml(tmp_path):
    config = {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "lightning_odem.ContinualMergeCallback",
                    "init_args": {
                        "method": {"class_path": "lightning_odem.PaperODEMerge", "init_args": {"solver": "heun"}},
                        "weights": {"rotated": 2.0, "inverted": 1.0},
                        "calibration": {"batch_size": 70, "quota": "utility"},
                        "exclude": ["backbone.norm"],
                    },
                }
            ]
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = main(["fit_tasks", "--config=config.yaml", *SMALL, *DIGITS, *QUIET, "--trainer.fast_dev_run=true"])
    merge = merge_callback(cli)
    assert isinstance(merge.method, PaperODEMerge)
    assert merge.method.solver == "heun"
    assert merge.calibration.batch_size == 70
    assert merge.report.weights == [2.0, 1.0]


def test_the_calibration_loss_and_its_shares_come_from_yaml(tmp_path):
    callback = {"class_path": "ContinualMergeCallback", "init_args": {"calibration": {"loss": "logits"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    shares = ["--trainer.callbacks.calibration.shares=utility", "--trainer.fast_dev_run=true"]
    cli = main(["fit_tasks", "--config=config.yaml", *SMALL, *DIGITS, *QUIET, *shares])
    merge = merge_callback(cli)
    assert (merge.calibration.loss, merge.calibration.shares) == ("logits", "utility")
    held = merge.state_dict()["buffer"]["tasks"]
    assert {task: samples["logits"].shape for task, samples in held.items()} == {
        task: (len(samples["samples"][1]), 10) for task, samples in held.items()
    }


def test_a_misspelt_option_is_refused_by_name(capsys):
    callback = ["--trainer.callbacks=ContinualMergeCallback", "--trainer.callbacks.metod=x"]
    with pytest.raises(SystemExit):
        main(["fit_tasks", *SMALL, *DIGITS, *callback])
    assert "metod" in capsys.readouterr().err


FITTED = {
    "model": "lightning.pytorch.demos.boring_classes.BoringModel",
    "data": {"class_path": "DigitsStream", "init_args": {"tasks": ["rotated"]}},
}


class Counted(ContinualCLI):
    """Counts the parsers that get options, and makes nothing of what was parsed."""

    def __init__(self, args, **options):
        self.filled = []
        classes = {"subclass_mode_model": True, "subclass_mode_data": True, "trainer_class": ContinualTrainer}
        with contextlib.suppress(SystemExit, StopIteration):
            super().__init__(L.LightningModule, TaskStream, args=args, **classes, **options)

    def add_arguments_to_parser(self, parser):
        self.filled.append(parser)

    def instantiate_classes(self):
        raise StopIteration


@pytest.mark.parametrize(
    ("line", "filled"),
    [
        ("--help", 0),
        ("-h", 0),
        ("fit --help", 1),
        ("fit_tasks --print_config", 1),
        ("--config top.yaml fit", 8),
        ("--config top.yaml --help", 8),
        ("--print_shtab=bash", 8),
        ("nothing", 8),
        ("", 8),
    ],
)
def test_parsers_of_other_subcommands_stay_empty_if_the_first_argument_is_one(line, filled):
    Path("top.yaml").write_text(yaml.safe_dump({"fit": FITTED}))
    assert len(Counted(line.split()).filled) == filled


def test_what_is_no_command_line_may_name_any_subcommand():
    cli = Counted({"subcommand": "fit", "fit": FITTED})
    assert len(cli.filled) == 8
    assert cli.config.subcommand == "fit"


@pytest.mark.parametrize("line", ["--config top.yaml", "--config top.yaml fit"])
def test_a_configuration_of_the_whole_command_line_has_sections_of_subcommands(line):
    Path("top.yaml").write_text(yaml.safe_dump({"subcommand": "fit", "fit": FITTED, "validate": FITTED}))
    cli = Counted(line.split())
    assert cli.config.subcommand == "fit"
    assert cli.config.fit.data.init_args.tasks == ["rotated"]


@pytest.mark.parametrize("line", ["fit", "validate"])
def test_default_configurations_have_sections_of_other_subcommands(line):
    Path("top.yaml").write_text(yaml.safe_dump({"fit": FITTED, "validate": FITTED}))
    cli = Counted([line], parser_kwargs={"default_config_files": ["top.yaml"]})
    assert cli.config[line].data.init_args.tasks == ["rotated"]


def test_an_unknown_method_lists_the_known_ones(capsys):
    callback = ["--trainer.callbacks=ContinualMergeCallback", "--trainer.callbacks.method=odd"]
    with pytest.raises((SystemExit, ValueError), match=r"2|average, .*ode"):
        main(["fit_tasks", *SMALL, *DIGITS, *callback, "--trainer.fast_dev_run=true"])


def test_fit_tasks_adds_the_callback_where_there_is_none():
    cli = main(["fit_tasks", *SMALL, *DIGITS, *QUIET, "--trainer.fast_dev_run=true"])
    assert merge_callback(cli).report.tasks == ["rotated", "inverted"]


def test_pretraining_without_a_source_task_is_refused(tmp_path):
    import numpy as np

    data = {f"{split}_images": np.zeros((4, 8, 8), np.uint8) for split in ("train", "val", "test")}
    data |= {f"{split}_labels": np.array([0, 1, 0, 1], np.uint8) for split in ("train", "val", "test")}
    np.savez(tmp_path / "blank.npz", **data)
    stream = ["--data=NpzStream", f"--data.root={tmp_path}", "--pretrain_epochs=1"]
    with pytest.raises(ValueError, match="pretrain_epochs=1 needs a stream with a source task"):
        main(["fit_tasks", *SMALL, *stream, *QUIET, "--trainer.fast_dev_run=true"])


@pytest.mark.slow
def test_the_installed_command_is_there_and_the_same_seed_gives_the_same_weights(tmp_path):
    script = Path(sys.executable).parent / "lightning-odem"
    command = [script, "fit_tasks", "--config", str(CONFIGS / "digits.yaml")]
    limits = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1", "--pretrain_epochs=1", *DIGITS]
    weights = []
    for fresh in (True, False):
        folder = tmp_path / str(fresh)
        folder.mkdir()
        if fresh:
            done = subprocess.run([*command, *limits], cwd=folder, capture_output=True, text=True, check=False)
        else:
            done = run_script(*command, *limits, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "after inverted" in done.stdout
        checkpoint = folder / "merge_runs" / "version_0" / "merged-02-inverted.ckpt"
        weights.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

"""Figures reach the loggers that take images, each by its own kind of storage and without network."""

import importlib.util

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from toy import Classifier, Task, fit

from lightning_odem import ContinualMergeCallback

NAMES = ["merge/accuracy_matrix", "merge/accuracy_over_stream", "merge/changes", "merge/path"]


def requires(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def merge_two_tasks(logger, directory):
    torch.manual_seed(0)
    module, merge = Classifier(), ContinualMergeCallback(dirpath=str(directory / "stream"))
    for number, name in enumerate(("$ 5<a", "..")):
        fit(module, Task(number, name=name), merge, logger=logger)
    return merge


@requires("tensorboard")
def test_tensorboard_has_an_image_per_figure_and_merge(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="logs")
    merge = merge_two_tasks(logger, tmp_path)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == NAMES
    assert [event.step for event in events.Images("merge/changes")] == [1, 2]
    (path,) = events.Images("merge/path")
    assert path.step == 2
    assert (path.width, path.height) == png_size(merge.dirpath / "path-02-...png")


@pytest.mark.slow
@requires("wandb")
def test_wandb_keeps_the_images_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    merge = merge_two_tasks(logger, tmp_path)
    logger.experiment.finish()
    found = [path.read_bytes() for path in tmp_path.rglob("files/media/images/merge/*.png")]
    assert len(found) == 7
    assert {path.read_bytes() for path in merge.dirpath.glob("*.png")} <= set(found)


@requires("mlflow")
def test_mlflow_keeps_the_images_as_artifacts_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=(tmp_path / "runs").as_uri())
    merge = merge_two_tasks(logger, tmp_path)
    found = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("artifacts/merge/*/*.png"))
    assert [path.parts[-2] for path in found] == ["01"] * 3 + ["02"] * 4
    last = next(path for path in found if path.parts[-2:] == ("02", "changes.png"))
    assert (tmp_path / last).read_bytes() == (merge.dirpath / "changes.png").read_bytes()
    logged = logger.experiment.get_run(logger.run_id).data.metrics
    assert logged["merge/acc.mean"] == pytest.approx(merge.report.acc())
    assert logged["merge/acc/_ 5_a"] == pytest.approx(merge.report.accuracy[-1][0])


def test_a_logger_of_numbers_gets_numbers_alone(tmp_path):
    logger = CSVLogger(tmp_path, name="logs")
    merge_two_tasks(logger, tmp_path)
    assert "merge/acc" in (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()


def png_size(path):
    header = path.read_bytes()[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")

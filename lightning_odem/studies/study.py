"""The steps that all studies have in common, from the data to the files of the results."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_odem.classifiers.classifier import TaskClassifier
from lightning_odem.classifiers.pixels import PixelClassifier
from lightning_odem.classifiers.pretraining import pretrain
from lightning_odem.methods.needs import Need
from lightning_odem.studies.workbench import Workbench
from lightning_odem.tasks import TaskStream

Result = TypeVar("Result")


@dataclass(frozen=True)
class Study(Generic[Result]):
    """A study of merges: how its result is computed from the fine-tuned models, shown and written.

    Args:
        name: Name of the study.
        run: Computes the result. It is called with the keywords ``bench``, ``directory`` (where cells are kept) and
            ``show_progress``.
        render: Makes the result's table.
        save: Writes data, tables and figures to a directory.
        needs: Needs of the methods. They collect while the models are fine-tuned.
    """

    name: str
    run: Callable[..., Result]
    render: Callable[[Result], str]
    save: Callable[[Result, str | os.PathLike], Any]
    needs: Sequence[Need[Any]] = ()

    def conduct(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        stream: TaskStream,
        dirpath: str,
        checkpoints: Mapping[str, str] | str | None = None,
        pretrain_epochs: int = 0,
        models: str | None = None,
    ) -> Result:
        """Fine-tune what is missing, run the missing cells, print the table and write all files.

        Args:
            trainer: Fine-tunes with its own settings.
            model: The module; its weights are the base model.
            stream: The tasks.
            dirpath: Directory of the results. The command line's configuration is saved there as ``<name>.yaml``.
            checkpoints: Models fine-tuned elsewhere, as for :class:`~lightning_odem.studies.Workbench`.
            pretrain_epochs: Epochs to pretrain the base model on the stream's source task first.
            models: Directory of the fine-tuned models and the cells; ``dirpath`` by default.
        """
        self._save_config(trainer, Path(dirpath))
        prepare(trainer, model, stream, pretrain_epochs)
        kept = models or dirpath
        bench = Workbench(trainer, model, stream, kept, checkpoints, self.needs)
        show_progress = trainer.progress_bar_callback is not None
        result = self.run(bench=bench, directory=Path(kept), show_progress=show_progress)
        self.save(result, dirpath)
        print(self.render(result))
        rank_zero_info(f"Results, tables and figures: {dirpath}")
        return result

    def _save_config(self, trainer: L.Trainer, directory: Path) -> None:
        """Save the command line's configuration once beside the results, not with each fit."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for saver in [callback for callback in callbacks if isinstance(callback, SaveConfigCallback)]:
            callbacks.remove(saver)
            directory.mkdir(parents=True, exist_ok=True)
            saver.parser.save(saver.config, directory / f"{self.name}.yaml", overwrite=True)


def prepare(trainer: L.Trainer, model: L.LightningModule, stream: TaskStream, pretrain_epochs: int = 0) -> None:
    """Set up all tasks of a stream, and pretrain the base model if that is asked for.

    Tasks are set up before anything is trained, so that bad data of the last task is found before the first is trained.

    Args:
        trainer: Its accelerator, ``limit_train_batches``, ``fast_dev_run`` and progress bar apply to the pretraining.
        model: The module. Pretraining changes its backbone in place.
        stream: The tasks.
        pretrain_epochs: Epochs on the stream's source task; 0 for a model that is pretrained already.

    Raises:
        ValueError: If pretraining is asked for but the stream has no source task, or the module is neither a
            :class:`~lightning_odem.classifiers.TaskClassifier` nor a
            :class:`~lightning_odem.classifiers.PixelClassifier`.
    """
    for task in stream:
        task.prepare_data()
        task.setup("fit")
    if not pretrain_epochs:
        return
    if stream.pretraining is None or not isinstance(model, (TaskClassifier, PixelClassifier)):
        raise ValueError(
            f"pretrain_epochs={pretrain_epochs} needs a stream with a source task and a TaskClassifier or "
            f"PixelClassifier, got {type(stream).__name__} and {type(model).__name__}. Set pretrain_epochs to 0 and "
            "load pretrained weights instead, for example with TaskClassifier's checkpoint."
        )
    rank_zero_info(f"Pretraining the base model on {stream.pretraining.task_name} for {pretrain_epochs} epochs")
    pretrain(
        model,
        stream.pretraining,
        pretrain_epochs,
        accelerator=trainer.strategy.root_device.type,
        fast_dev_run=trainer.fast_dev_run,  # type: ignore[attr-defined]
        limit_train_batches=trainer.limit_train_batches,
        enable_progress_bar=trainer.progress_bar_callback is not None,
    )

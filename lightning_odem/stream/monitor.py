"""The value that a module logs in its own validation, as the score of a task."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import lightning as L
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_odem.metrics import TaskMetric
from lightning_odem.stream.evaluation import Score
from lightning_odem.stream.evaluation_data import EvaluationData

MODES = ("max", "min")


class Monitor:
    """Runs the Trainer's own validation loop on a task's data and reads what ``validation_step`` has logged.

    It is ``trainer.validate`` with all hooks, limits, inference mode and progress bar, but nothing goes to loggers and
    the Trainer's ``callback_metrics`` stay as they are.

    Args:
        name: Name of the logged value, as in ``ModelCheckpoint(monitor=...)``.
        mode: ``"max"`` if higher values are better, ``"min"`` if lower ones are.

    Raises:
        ValueError: For another mode.
    """

    def __init__(self, name: str, mode: Literal["max", "min"] = "max") -> None:
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}.")
        self.name = name
        self.metric = TaskMetric(name, unit="", higher_is_better=mode == "max")

    def measure(self, module: L.LightningModule, data: EvaluationData, batches: int | None = None) -> Score:
        """Validate the module on a task's data.

        Args:
            module: The module, with a Trainer.
            data: The data; the limit of its stage applies.
            batches: Take so many batches instead.

        Raises:
            ValueError: If the module has no ``validation_step``, or logs no such value.
        """
        if not is_overridden("validation_step", module):
            raise ValueError(
                f"monitor={self.name!r} is what validation_step logs, and {type(module).__name__} has none. Define it, "
                "or leave monitor out: scores are then measured by task_metric(task) or as accuracy."
            )
        trainer = module.trainer
        with _validation_on(trainer, data, batches):
            logged = trainer.validate_loop.run()
        found = {name: float(value) for values in logged for name, value in values.items()}
        if self.name not in found:
            raise ValueError(
                f"monitor={self.name!r} was not logged by validation_step or on_validation_epoch_end of "
                f"{type(module).__name__}; logged were: {', '.join(found) or 'no values'}."
            )
        return Score(found.pop(self.name), self.metric, found)


@contextmanager
def _validation_on(trainer: L.Trainer, data: EvaluationData, batches: int | None) -> Iterator[None]:
    """Let the Trainer's validation loop run on other data within a fit, and leave no trace of it."""
    loop, state, connector = trainer.validate_loop, trainer.state, trainer._logger_connector
    kept = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
    logged = {name: dict(vars(connector)[name]) for name in kept}
    before = (state.fn, state.stage, loop._data_source, loop._combined_loader, loop.verbose)
    limit, loggers = trainer.limit_val_batches, trainer.loggers
    state.fn, state.stage = TrainerFn.VALIDATING, RunningStage.VALIDATING
    loop._data_source, loop.verbose = _DataLoaderSource(data.batches, "val_dataloader"), False
    trainer.limit_val_batches = data.limit(trainer) if batches is None else batches
    trainer.loggers = [DummyLogger()] if loggers else []
    try:
        yield
    finally:
        state.fn, state.stage, loop._data_source, loop._combined_loader, loop.verbose = before
        trainer.limit_val_batches, trainer.loggers = limit, loggers
        vars(connector).update(logged)

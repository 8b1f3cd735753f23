"""A module outside of ``fit``, on its device, under a Trainer's precision, with its transfer hooks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector


@contextmanager
def attached(module: L.LightningModule, like: L.Trainer | None = None) -> Iterator[L.Trainer]:
    """Attach a module to a Trainer of its own, on one device and in eval mode.

    Losses and predictions run as in ``fit``, without Lightning's loops. Afterwards the module is on the CPU and has the
    Trainer and the mode that it had.

    Args:
        module: The module.
        like: A Trainer whose accelerator, precision and ``limit_test_batches`` are used; by default Lightning chooses.

    Example:
        >>> module = L.LightningModule()
        >>> with attached(module) as trainer:
        ...     module.trainer is trainer
        True
    """
    with _quiet():
        trainer = L.Trainer(
            **({"devices": 1} if like is None else _settings(like)),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    before, training = module._trainer, module.training
    trainer.precision_plugin.convert_module(module)
    trainer.strategy.connect(module)
    # fit sets it first; batch-transfer hooks are looked up through it.
    trainer._data_connector._datahook_selector = _DataHookSelector(module, None)
    module.trainer = trainer
    module.to(trainer.strategy.root_device)
    module.eval()
    try:
        yield trainer
    finally:
        module.cpu()
        module.train(training)
        module._trainer = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Run a block without Lightning's lines on the devices, which the user's Trainer has shown already."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _settings(like: L.Trainer) -> dict:
    device = like.strategy.root_device
    return {
        "accelerator": device.type,
        "devices": 1 if device.index is None or device.type == "cpu" else [device.index],
        "precision": like.precision,
        "limit_test_batches": like.limit_test_batches,
    }

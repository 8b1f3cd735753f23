"""A module at work outside of ``fit``: on its device, under a Trainer's precision, with its transfer hooks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector


@contextmanager
def attached(module: L.LightningModule, like: L.Trainer | None = None) -> Iterator[L.Trainer]:
    """Attach a module to a Trainer of its own, on one device, in eval mode; afterwards it is on the CPU and free again.

    Losses and predictions then run as they do in ``fit``: Lightning's own loops are not needed for them.

    Args:
        module: The module.
        like: Trainer whose accelerator, precision and ``limit_test_batches`` to use; by default Lightning's choice.

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
    # Set by fit before anything else; batch-transfer hooks are looked up through it.
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
    """Without Lightning's lines on which devices there are: the Trainer of the user has said so."""
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

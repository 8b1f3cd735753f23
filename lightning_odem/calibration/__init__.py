"""The calibration buffer, the loss and gradient of a module on it, and where its samples come from."""

from lightning_odem.calibration.batch_norm import BatchNormStatistics
from lightning_odem.calibration.buffer import CalibrationBuffer
from lightning_odem.calibration.objective import CalibrationObjective
from lightning_odem.calibration.options import CalibrationOptions
from lightning_odem.calibration.samples import MicroBatch, TaskSamples

__all__ = [
    "BatchNormStatistics",
    "CalibrationBuffer",
    "CalibrationObjective",
    "CalibrationOptions",
    "MicroBatch",
    "TaskSamples",
]

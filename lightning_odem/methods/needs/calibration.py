"""The need of losses on the calibration samples."""

from typing import TYPE_CHECKING

from lightning_odem.calibration import CalibrationObjective
from lightning_odem.methods.needs.need import Need
from lightning_odem.methods.needs.sources import Offer, Sources

if TYPE_CHECKING:
    from lightning_odem.report.record import MergeRecord


class Calibration(Need[CalibrationObjective]):
    """Losses and gradients on all tasks' samples, see :class:`~lightning_odem.calibration.CalibrationObjective`."""

    source = "calibration samples and a module with a loss"
    from_samples = True

    def is_met(self, offer: Offer) -> bool:
        """Whether there are samples and a loss."""
        return offer.calibration

    def build(self, sources: Sources) -> CalibrationObjective:
        """The loss as a function of the vector."""
        assert sources.calibration is not None, "the need is met"
        return sources.calibration.objective(sources.vector)

    def account(self, built: CalibrationObjective, record: "MergeRecord") -> None:
        """Count gradients, passes without gradient, and the time they took."""
        record.gradient_evaluations = built.gradient_evaluations
        record.loss_evaluations = built.loss_evaluations
        record.sample_gradients += built.sample_gradients
        record.gradient_seconds = built.seconds

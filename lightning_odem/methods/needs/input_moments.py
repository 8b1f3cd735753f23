"""The need of the inputs of the incoming model's layers."""

from collections.abc import Mapping

from torch import Tensor

from lightning_odem.calibration.input_moments import input_moments
from lightning_odem.methods.needs.need import Need
from lightning_odem.methods.needs.sources import Offer, Sources


class InputMoments(Need[Mapping[str, Tensor]]):
    """Second moments of the inputs of linear layers and convolutions in the incoming model, on its own task's samples.

    The moments are stored by the name of the layer's weight, in the shape [groups, in, in], see
    :func:`~lightning_odem.calibration.input_moments.input_moments`. Parameters that are used in another way have no
    moments. A task without calibration samples has none at all.
    """

    source = "calibration samples and a module with a loss"
    from_samples = True

    def is_met(self, offer: Offer) -> bool:
        """Whether there are samples and a module that can run them."""
        return offer.calibration

    def build(self, sources: Sources) -> Mapping[str, Tensor]:
        """Pass the incoming task's samples once through its own model."""
        calibration = sources.calibration
        assert calibration is not None, "the need is met"
        return input_moments(sources.layers, calibration.batches_of(sources.task), calibration.batch_loss)

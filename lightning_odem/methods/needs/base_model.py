"""The need of the base model."""

from torch import Tensor

from lightning_odem.methods.needs.need import Need
from lightning_odem.methods.needs.sources import Offer, Sources


class BaseModel(Need[Tensor]):
    """The base model theta_base, from which all tasks are fine-tuned; shape [d]."""

    source = "the base model"

    def is_met(self, offer: Offer) -> bool:
        """Whether a base model is given."""
        return offer.base

    def build(self, sources: Sources) -> Tensor:
        """The merged parameters of the base model as a vector."""
        return sources.vector.gather(sources.base)

"""The need of the optimizer's second moments."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from lightning_odem.methods.needs.need import Need
from lightning_odem.methods.needs.sources import Offer, Sources, TrainingRun
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.vector import canonical_name

SECOND_MOMENT = "exp_avg_sq"


class SecondMoments(Need[Tensor]):
    """Adam's running mean of squared gradients at the end of the incoming model's training, shape [d].

    It is NaN for parameters that the optimizer never stepped.
    """

    source = "the optimizer's second moments at the end of the training"

    def check(self, run: TrainingRun) -> None:
        """Refuse optimizers that keep no second moments.

        Raises:
            ValueError: If one keeps none; the message names it and the optimizers that would work.
        """
        check_second_moments(run.trainer.optimizers, run.method)

    def collect(self, run: TrainingRun, kept: dict[str, Any]) -> Snapshot:
        """The raw moments of the optimizer, by name of the parameter."""
        return second_moments(run.trainer.optimizers, run.module)

    def is_met(self, offer: Offer) -> bool:
        """Whether a training left some."""
        return bool(offer.collected.get(type(self)))

    def build(self, sources: Sources) -> Tensor:
        """The moments as a vector."""
        found, vector = sources.collected[type(self)], sources.vector
        if vector.adapters is not None:
            found = vector.adapters.squared_gradients(found)
        unstepped = {
            name: torch.full(shape, torch.nan)
            for name, shape in zip(vector.names, vector.shapes, strict=True)
            if name not in found
        }
        return vector.gather({**found, **unstepped})


def second_moments(optimizers: Iterable[Optimizer], module: nn.Module) -> Snapshot:
    """Adam's running mean of squared gradients by name of the parameter, on the CPU and raw."""
    states = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    return {
        canonical_name(name): states[parameter][SECOND_MOMENT].detach().to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if SECOND_MOMENT in states.get(parameter, {})
    }


def check_second_moments(optimizers: Iterable[Optimizer], method: str) -> None:
    """Refuse optimizers that keep no second moments, before any training.

    Raises:
        ValueError: If one keeps none; the message names it and the optimizers that would work.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            raise ValueError(
                f"Merge method {method!r} needs the optimizer's second moments, but ZeroRedundancyOptimizer leaves "
                "each process only a part of them. Use the optimizer it wraps."
            )
        if not _keeps_second_moments(optimizer):
            raise ValueError(
                f"Merge method {method!r} needs the optimizer's second moments ({SECOND_MOMENT!r} in its state), but "
                f"{type(optimizer).__name__} keeps none. Train with Adam, AdamW or another of that family, or choose "
                "another method."
            )


def _keeps_second_moments(optimizer: Optimizer) -> bool:
    # An optimizer shows what it keeps only after a step, so a copy of it takes one on a parameter made for this.
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones_like(parameter)
    try:
        trial = type(optimizer)([parameter], **optimizer.defaults)
        trial.step()
    except Exception:  # an optimizer that cannot be tried is judged after the training, by what it has kept
        return True
    return SECOND_MOMENT in trial.state.get(parameter, {})

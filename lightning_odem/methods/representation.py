"""Correction of a merged model's features towards those of the model before the merge."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from lightning_odem.arguments import check_choice, check_patterns, check_range
from lightning_odem.flow import NonFiniteLossError
from lightning_odem.methods.base import MergeContext, MergeMethod, MergeResult
from lightning_odem.methods.layout import tensors, weight_matrices
from lightning_odem.methods.needs import Calibration, TrainingData, combine

Loss = Literal["l1", "l2"]
_LOSSES = {"l1": l1_loss, "l2": mse_loss}


class RepresentationCorrection(MergeMethod):
    r"""Any merge method followed by a representation correction, stage C of HCMM (arXiv 2509.23592).

    After the merge, the features z of the incoming task's training samples are pulled back to those of the previous
    merged model. One epoch of AdamW on a few weight matrices of :math:`\Psi_k` minimises

    .. math:: \mathbb{E}_{x \in D_k} |z(x; \Psi_k) - z(x; \Psi_{k-1})|

    averaged over the features' dimensions, or the squared difference. Features are what the module's
    ``features(inputs)`` returns, or its predictions if it has no such method.

    Each batch costs a pass with gradient and one without. Besides the wrapped method's memory, three vectors of the
    model's size and Adam's moments of the corrected matrices are held. State, first task and the operating time reached
    are the wrapped method's. Nothing is corrected if a task has utility weight 0 or the method chose the time 0. See
    ``docs/methods.md``.

    Args:
        method: The merge method, an instance, a registered name or an import path.
        layers: Patterns of the weight matrices to correct, see :func:`~lightning_odem.methods.layout.weight_matrices`;
            None takes the last one, on which the features should depend.
        lr: Learning rate, constant. The default is the released code's, for CLIP ViT-B/16; elsewhere a small fraction
            of the entries' own size over the number of batches is sensible, see ``docs/methods.md``.
        loss: ``"l1"`` (the default of the released code) or ``"l2"`` (what its class-incremental script sets).
        weight_decay: AdamW's weight decay; 0.01 is PyTorch's default, which the released code keeps.
        clip: Largest norm of the gradient of the corrected matrices together; 1 as released.

    Raises:
        ValueError: For numbers out of range or an unknown loss; when merging, for patterns that match nothing, or if
            there is no weight matrix.
        NonFiniteLossError: If the loss or its gradient is not finite.
    """

    def __init__(
        self,
        method: str | MergeMethod,
        layers: Sequence[str] | None = None,
        lr: float = 2e-8,
        loss: Loss = "l1",
        weight_decay: float = 0.01,
        clip: float = 1.0,
    ) -> None:
        from lightning_odem.methods.registry import resolve_method  # which itself imports methods made of this one

        self.method = resolve_method(method)
        self.needs = combine([*self.method.needs, TrainingData()])
        self.layers = check_patterns("layers", layers)
        self.lr = check_range("lr", lr, 0)
        self.loss = check_choice("loss", loss, get_args(Loss))
        self.weight_decay = check_range("weight_decay", weight_decay, 0)
        self.clip = check_range("clip", clip, 0, open_low=True)

    def start(self, incoming: Tensor, context: MergeContext) -> MergeResult:
        """The wrapped method's first model; there is no earlier model to correct towards."""
        return self.method.start(incoming, context)

    def merge(self, merged: Tensor, incoming: Tensor, t: float, context: MergeContext) -> MergeResult:
        """Merge by the wrapped method, then correct."""
        if t == 0.0 or self.lr == 0.0:
            return self.method.merge(merged, incoming, t, context)
        result = self.method.merge(merged.clone(), incoming, t, context)
        if result.t == 0.0:
            return result
        # The method may have returned the incoming model itself.
        theta, path = self._correct(result.theta.clone(), merged, t, context), result.trajectory
        if path is not None:
            loss = context[Calibration].loss(theta) if Calibration in context else math.nan
            path = replace(path, theta=theta, loss=[*path.loss[:-1], loss])
        return replace(result, theta=theta, trajectory=path)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped method's state."""
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand a state to the wrapped method."""
        self.method.load_state_dict(state)

    def _correct(self, theta: Tensor, before: Tensor, t: float, context: MergeContext) -> Tensor:
        data = context[TrainingData]
        names = weight_matrices(context, self.layers)
        if not names:
            raise ValueError(
                "There is no weight matrix to correct among the merged parameters: " + ", ".join(context.names) + "."
            )
        names = names[-1:] if self.layers is None else names
        corrected = [tensors(theta, context)[name] for name in names]  # share the memory of theta
        optimizer = torch.optim.AdamW(corrected, lr=self.lr, weight_decay=self.weight_decay)
        for step, batch in enumerate(data):
            features = partial(data.features, batch)
            target = data.evaluate(before, features)
            value, grad = data.value_and_grad(theta, batch, partial(self._distance, features, target))
            pieces = tensors(grad, context)
            for matrix, name in zip(corrected, names, strict=True):
                matrix.grad = pieces[name].to(matrix.dtype)
            norm = torch.nn.utils.clip_grad_norm_(corrected, self.clip)
            if not math.isfinite(value) or not norm.isfinite():
                what = f"The representation loss is {value} and the norm of its gradient {norm.item()}"
                raise NonFiniteLossError(what, step, t)
            optimizer.step()
        return theta

    def _distance(self, features: Callable[[], Tensor], target: Tensor) -> Tensor:
        return _LOSSES[self.loss](features().float(), target.float())

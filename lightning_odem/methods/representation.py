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

    averaged over the features' dimensions, or the squared difference. It protects what came before at the expense of
    the incoming task. Features are what the module's ``features(inputs)`` returns, or its predictions if it has no such
    method. Batch-norm layers use the merged statistics of the utility time on both sides.

    The released code corrects CLIP's visual projection, which it finds by its shape; in any other backbone it corrects
    nothing. By default this class corrects the last weight matrix among the merged parameters. Name other matrices in
    ``layers`` if the features do not depend on that one.

    Each batch costs a pass without gradient, a pass with gradient and two writes of the weights into the module. That
    is less than storing the features of a whole epoch, since a shuffled or augmented epoch does not come a second time.
    Memory: three vectors of the model's size (the previous model, the corrected model, a gradient) besides those of the
    wrapped method, and Adam's two moments of the corrected matrices.

    State, first task and the operating time reached are the wrapped method's. A task of utility weight 0 changes
    nothing. Nothing is corrected if the method chose the time 0. The loss at the end of a path, and with it barrier and
    envelope excess, is that of the corrected model; this takes one more pass over the calibration samples.

    Args:
        method: The merge method, an instance, a registered name or an import path.
        layers: Patterns of the weight matrices to correct, see
            :func:`~lightning_odem.methods.layout.weight_matrices`; None takes the last one.
        lr: Learning rate, constant. 2e-8 is the released code's default. Its class-incremental script sets 1e-7; both
            are for CLIP ViT-B/16. Its domain-incremental script sets 0: no correction. AdamW moves an entry by about lr
            per batch for any size of the gradient, so a sensible value is a small fraction of the entries' own size
            over the number of batches.
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

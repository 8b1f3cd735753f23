"""Linear probes: a linear classifier fitted to the features of a frozen backbone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_odem.parameters.snapshot import undisturbed

ABSENT_BIAS = -20.0
"""Bias of a class without samples: it takes at most e^-20 = 2e-9 of the probability, and stays finite in fp16."""

LEAST_SPREAD = 1e-4
"""Standard deviation, relative to the largest one, below which a feature counts as constant."""


def fit_linear_probe(features: Tensor, labels: Tensor, num_classes: int, l2: float = 3.0) -> tuple[Tensor, Tensor]:
    r"""Fit a multinomial logistic regression to standardised features.

    The fit minimises :math:`\sum_n -\log p(y_n | x_n) + \tfrac{l2}{2} \lVert W \rVert^2` over weight W and bias, with
    every feature scaled to mean 0 and variance 1. The scaling is then folded into the returned weight and bias, which
    apply to the features as they are. Over the classes with samples, weights and biases sum to zero, so the largest
    logit of these classes is never negative, even if the features change later. A class without samples has weight 0
    and bias ``ABSENT_BIAS``. A feature that varies less than ``LEAST_SPREAD`` times as much as the one that varies most
    gets no weight: scaled to variance 1, it would drown all others once fine-tuning moves it.

    Args:
        features: Features [N, D] of any floating dtype; computed in fp64.
        labels: Integer classes [N] in [0, ``num_classes``).
        num_classes: Number of classes C.
        l2: Precision of the Gaussian prior on the weights. It counts less with more samples, because the loss is a sum
            over samples. On different image tasks with tens to hundreds of samples per class, the validation likelihood
            of pretrained features was flat around the default. A tenth of it overfits (equal accuracy, clearly
            overconfident). Ten times as much costs accuracy if there are many classes.

    Returns:
        Weight [C, D] and bias [C], fp32, on the device of the features.

    Raises:
        ValueError: If there are no samples, shapes do not match, a feature is not finite, labels are not integers or
            lie outside the classes, or ``l2`` is not positive.

    Example:
        >>> features = torch.tensor([[-2.0, 0.1], [-1.0, -0.1], [1.0, 0.1], [2.0, -0.1]])
        >>> weight, bias = fit_linear_probe(features, torch.tensor([0, 0, 1, 1]), num_classes=3)
        >>> (features @ weight.T + bias).argmax(1).tolist()
        [0, 0, 1, 1]
    """
    _check(features, labels, num_classes, l2)
    from sklearn.linear_model import LogisticRegression  # here, since it takes long to import
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    scaled = scaler.fit_transform(features.detach().to("cpu", torch.float64).numpy())
    spread = np.sqrt(scaler.var_)
    scaled[:, spread < LEAST_SPREAD * spread.max()] = 0.0
    targets = labels.cpu().numpy()
    present = np.unique(targets)
    weight = np.zeros((num_classes, features.shape[1]))
    bias = np.full(num_classes, ABSENT_BIAS)
    bias[present] = 0.0
    if len(present) > 1:
        # With two classes scikit-learn penalises the difference of the two weights, which is twice the multinomial
        # penalty.
        strength = (2.0 if len(present) == 2 else 1.0) / l2
        fit = LogisticRegression(C=strength, tol=1e-6, max_iter=1000).fit(scaled, targets)
        coefficients = fit.coef_ / scaler.scale_
        intercepts = fit.intercept_ - coefficients @ scaler.mean_
        if len(present) == 2:
            coefficients, intercepts = (
                np.vstack([-coefficients, coefficients]) / 2,
                np.hstack([-intercepts, intercepts]) / 2,
            )
        weight[present] = coefficients - coefficients.mean(axis=0)
        bias[present] = intercepts - intercepts.mean()
    return tuple(torch.from_numpy(x).to(features.device, torch.float32) for x in (weight, bias))  # type: ignore[return-value]


def extract_features(
    backbone: nn.Module,
    dataset: Dataset | Sequence[tuple[Any, Any]],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Compute the features of every sample, in the order of the dataset, with the backbone in eval mode.

    Afterwards every training flag, every buffer and the global random states are as before.

    Args:
        backbone: Maps images to features [B, D]. It stays on its device.
        dataset: Pairs of image and label.
        batch_size: Samples per forward pass.
        device: The device of the backbone.

    Returns:
        Features [N, D], fp32, and labels [N], int64, on the CPU.

    Raises:
        ValueError: If the dataset is empty, labels are not integers, or the backbone does not return one tensor [B, D].

    Example:
        >>> dataset = [(torch.full((1, 2, 2), float(i)), i) for i in range(3)]
        >>> extract_features(nn.Flatten(), dataset)
        (tensor([[0., 0., 0., 0.],
                [1., 1., 1., 1.],
                [2., 2., 2., 2.]]), tensor([0, 1, 2]))
    """
    features, labels = [], []
    with undisturbed(backbone), torch.no_grad():
        for images, targets in DataLoader(dataset, batch_size=batch_size):  # type: ignore[arg-type]
            output = backbone(images.to(device))
            if not isinstance(output, Tensor) or output.ndim != 2:
                found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"The backbone returned {found} for images {list(images.shape)}; features are [B, D].")
            features.append(output.to("cpu", torch.float32))
            _check_integers(targets)
            labels.append(targets.to("cpu", torch.int64))
    if not features:
        raise ValueError(f"There are no samples in {type(dataset).__name__} to extract features from.")
    return torch.cat(features), torch.cat(labels)


def _check(features: Tensor, labels: Tensor, num_classes: int, l2: float) -> None:
    if features.ndim != 2 or not features.numel() or labels.shape != features.shape[:1]:
        raise ValueError(
            f"A linear probe takes features [N, D] and labels [N] with N and D at least 1, found features "
            f"{list(features.shape)} and labels {list(labels.shape)}."
        )
    _check_integers(labels)
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(f"Label {outside[0].item()} is not one of {num_classes} classes (0 to {num_classes - 1}).")
    broken = (~features.isfinite().all(dim=1)).sum().item()
    if broken:
        raise ValueError(f"{broken} of {len(features)} samples have NaN or infinite features.")
    if not l2 > 0:
        raise ValueError(f"l2 is {l2}; it must be positive.")


def _check_integers(labels: Tensor) -> None:
    if labels.is_floating_point():
        raise ValueError(f"The labels of a linear probe are integers, found {labels.dtype}.")

"""What a classifier applies to its images: normalisation and backbone."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Scale uint8 to [0, 1], repeat grey images to the backbone's channels, normalise.

    Args:
        backbone: Module that takes the images. Its first convolution defines the number of channels. Its
            ``pretrained_cfg`` gives statistics that are not given here.
        mean: Channel means of [0, 1] images, or None.
        std: Channel standard deviations, or None.

    Raises:
        ValueError: If the length of ``mean`` or ``std`` is neither 1 nor the number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        convolutions = (module for module in backbone.modules() if isinstance(module, nn.Conv2d))
        self.channels = next((module.in_channels for module in convolutions), None)
        known = getattr(backbone, "pretrained_cfg", None) or {}
        for name, given in (("mean", mean), ("std", std)):
            values = list(known.get(name) or [0.5]) if given is None else list(given)
            if self.channels is not None and len(values) not in (1, self.channels):
                if given is not None:
                    raise ValueError(f"{name} has {len(values)} values, the backbone takes {self.channels} channels.")
                values = [sum(values) / len(values)]  # RGB statistics for a backbone built for other channels
            # Not persistent: these are constants of the base model, which are neither merged nor saved.
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] ready for the backbone."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise TypeError(f"Images are uint8 in [0, 255] or floating in [0, 1], found {images.dtype}.")
        if images.shape[1] == 1 and self.channels is not None:
            images = images.expand(-1, self.channels, -1, -1)
        return (images.to(self.mean.dtype) - self.mean) / self.std


def build_backbone(backbone: str | nn.Module, args: dict[str, Any] | None, pretrained: bool) -> nn.Module:
    """Build a timm model without its classifier, or return the module itself.

    Raises:
        ValueError: If timm has no such model, or arguments for timm come with a module.
    """
    if isinstance(backbone, nn.Module):
        if args or pretrained:
            raise ValueError(
                f"backbone_args and pretrained are for timm model names; the backbone is a {type(backbone).__name__}. "
                "Give its arguments to the module itself and its weights as checkpoint."
            )
        return backbone
    import timm  # here, since it takes longer to import than the rest of the package

    if ":" not in backbone and not timm.is_model(backbone):  # "hf-hub:..." and "local-dir:..." name no registered model
        close = difflib.get_close_matches(backbone, timm.list_models(), n=5) or timm.list_models()[:5]
        raise ValueError(f"timm has no model {backbone!r}. Close names: {', '.join(close)}; all: timm.list_models().")
    return timm.create_model(backbone, pretrained=pretrained, num_classes=0, **(args or {}))

"""Networks linearised around a point, for fine-tuning in the tangent space."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

_DESCRIPTION = ("num_features", "head_hidden_size", "pretrained_cfg")


class Linearized(nn.Module):
    r"""A backbone's first-order Taylor expansion in its parameters.

    .. math:: f_{lin}(x; \theta) = f(x; \theta_0) + J_\theta f(x; \theta_0) (\theta - \theta_0)

    The output is affine in :math:`\theta`: the mean of two models' weights gives the mean of their outputs. For the
    network itself this holds at best near :math:`\theta_0`. Fine-tuning in this space is stage A of HCMM (arXiv
    2509.23592), after Ortiz-Jimenez et al. (NeurIPS 2023).

    :math:`\theta` are the parameters of ``model``, which train and merge as they would without linearisation.
    ``origin`` holds :math:`\theta_0` and its batch-norm statistics. It is a frozen copy of the backbone that is saved
    with the module. (It has frozen parameters instead of buffers, because distributed training broadcasts buffers in
    every step.)

    One forward pass with a forward-mode derivative (``torch.func.jvp``) computes both terms. It takes two to three
    times the time and twice the memory of the backbone's own pass, besides the second copy of the parameters. The
    network is always in eval mode, since dropout and batch-norm updates have no part in an expansion around a point.
    Autocast does not apply to the network: PyTorch's forward derivatives of normalisation layers do not keep the
    reduced precision, and its rounding would drown what the tangent adds. Attention runs in PyTorch's plain kernel, the
    only one with forward derivatives.

    Args:
        backbone: The network. Its current weights are both :math:`\theta_0` and :math:`\theta`. Its output is a tensor.
            Its attributes ``num_features``, ``head_hidden_size`` and ``pretrained_cfg`` are passed on.

    Example:
        >>> net = Linearized(nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)))
        >>> for parameter in net.origin.parameters():
        ...     _ = parameter.data.fill_(1.0)
        >>> for parameter in net.model.parameters():
        ...     _ = parameter.data.fill_(1.5)
        >>> net.model(torch.ones(1)).item(), net(torch.ones(1)).item()  # 1.5 * 1.5 and 1 + 0.5 + 0.5
        (2.25, 2.0)
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.model = backbone
        self.origin = deepcopy(backbone).requires_grad_(False)
        for name in _DESCRIPTION:
            if hasattr(backbone, name):
                setattr(self, name, getattr(backbone, name))
        self.train()

    def forward(self, inputs: Tensor) -> Tensor:
        """The linearised output, with a gradient for theta."""
        device = inputs.device.type
        if torch.is_autocast_enabled(device) and inputs.is_floating_point():
            inputs = inputs.float()  # a layer before this one may have reduced it
        theta = dict(self.model.named_parameters())
        origin = {name: parameter.detach() for name, parameter in self.origin.named_parameters()}
        change = {name: theta[name] - parameter for name, parameter in origin.items()}
        with torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
            output = jvp(lambda point: functional_call(self.origin, point, (inputs,)), (origin,), (change,))
        return output[0] + output[1]

    def train(self, mode: bool = True) -> "Linearized":
        """Set the training mode; the network itself stays in eval mode."""
        super().train(mode)
        self.model.eval()
        self.origin.eval()
        return self

    def recenter_(self) -> None:
        """Make the current weights and statistics of ``model`` the expansion point."""
        self.origin.load_state_dict(self.model.state_dict())

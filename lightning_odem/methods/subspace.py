"""Optimisation in few dimensions: an affine subspace of the flat weight vectors, spanned tensor by tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_odem.methods.linalg import exact, singular


def orthonormal(directions: Tensor) -> Tensor:
    """Find an orthonormal basis of the span of k directions.

    A direction that is a combination of the others, up to rounding, adds nothing. The basis has as many rows as the
    numerical rank, and none if all directions are zero. Computed in fp64, by a QR decomposition and the singular values
    of its small factor.

    Args:
        directions: Shape [k, n], neither zero.

    Returns:
        Shape [r, n] with orthonormal rows, r <= min(k, n), in the dtype of the directions.

    Example:
        >>> orthonormal(torch.tensor([[0.0, 3.0, 0.0], [0.0, -1.0, 0.0]])).abs()
        tensor([[0., 1., 0.]])
    """
    q, r = torch.linalg.qr(exact(directions).T)
    rotation, _, _ = singular(r.to(directions.dtype))
    return (q @ rotation).T.to(directions)


@dataclass(frozen=True)
class Subspace:
    r"""The points :math:`\theta(c) = \theta_o + (B_1^T c_1, \dots, B_P^T c_P)`, a coefficient vector per tensor.

    Args:
        origin: The point of coefficients zero, shape [d].
        bases: The basis :math:`B_p` of each of the P tensors in turn, shape [r_p, n_p]; the n_p sum to d.

    Example:
        >>> plane = Subspace(torch.zeros(3), [torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0]])])
        >>> plane.point(torch.tensor([1.0, 5.0]))
        tensor([0., 2., 5.])
        >>> plane.pull_back(torch.tensor([7.0, 1.0, 1.0]))
        tensor([2., 1.])
    """

    origin: Tensor
    bases: Sequence[Tensor]

    @property
    def dimension(self) -> int:
        """Number of coefficients."""
        return sum(len(basis) for basis in self.bases)

    def point(self, coefficients: Tensor) -> Tensor:
        """The point theta(c), a new vector [d], of coefficients [dimension]."""
        pieces = coefficients.split([len(basis) for basis in self.bases])
        moves = [piece @ basis for piece, basis in zip(pieces, self.bases, strict=True)]
        return torch.cat(moves) + self.origin

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Turn the gradient [d] of a loss by the weights into its gradient by the coefficients, by the chain rule."""
        pieces = gradient.split([basis.shape[1] for basis in self.bases])
        return torch.cat([basis @ piece for basis, piece in zip(self.bases, pieces, strict=True)])

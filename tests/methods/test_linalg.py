import math

import pytest
import torch

from lightning_odem.methods.linalg import norm, singular


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factors_give_the_matrix_back(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    u, s, v = singular(matrix)
    torch.testing.assert_close(u @ s.diag() @ v.T, matrix.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=torch.float64))
    torch.testing.assert_close(v.T @ v, torch.eye(len(s), dtype=torch.float64))
    assert s.tolist() == sorted(s.tolist(), reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_directions_that_are_rounding_errors_are_left_out(dtype, rank):
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (6, 8))
    # The product is rounded to dtype, which gives it full rank in the strict sense.
    u, s, v = singular((left @ right.T).to(dtype))
    assert (u.shape, s.shape, v.shape) == ((6, rank), (rank,), (8, rank))


def test_norms_are_summed_in_double_precision():
    vector = torch.full((3_000_000,), 0.1)
    assert norm(vector) == pytest.approx(math.sqrt(3_000_000) * float(torch.tensor(0.1)), rel=1e-12)
    assert norm(torch.zeros(3)) == 0.0

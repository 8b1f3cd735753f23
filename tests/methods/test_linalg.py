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


@pytest.mark.parametrize("shape", [(300, 80), (80, 300), (260, 260)])
def test_large_fp32_matrices_keep_the_digits_of_every_direction_that_counts(shape):
    generator = torch.Generator().manual_seed(2)
    size = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64))[0] for n in shape)
    values = torch.logspace(0, -4, size, dtype=torch.float64)
    matrix = ((left * values) @ right.T).float()
    u, s, v = singular(matrix)
    expected = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(s, expected.S[: len(s)], rtol=1e-7, atol=0)
    torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(u @ s.diag() @ v.T, matrix.double(), rtol=0, atol=max(shape) * 1.2e-7)
    assert len(s) >= size - 2


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

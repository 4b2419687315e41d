"""The randomised decomposition beside numpy's full one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.base import residual

SHAPES = [(37, 91), (91, 37), (64, 64), (130, 200)]


def of_spectrum(shape: tuple[int, int], values: np.ndarray, seed: int = 0) -> torch.Tensor:
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.standard_normal((n, len(values))))[0] for n in shape)
    return torch.from_numpy((left * values) @ right.T).float()


def left_over(matrix: torch.Tensor, rank: int) -> float:
    b, a = residual.low_rank(matrix, rank)
    assert b.shape == (matrix.shape[0], rank) and a.shape == (rank, matrix.shape[1])
    return float(np.linalg.norm(matrix.double().numpy() - b.double().numpy() @ a.double().numpy()))


def best(matrix: torch.Tensor, rank: int) -> float:
    """Eckart and Young: what the best matrix of a rank leaves."""
    return float(np.linalg.norm(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[rank:]))


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_that_stand_out_are_found_to_rounding(shape: tuple[int, int]) -> None:
    tail = 1e-3
    matrix = of_spectrum(shape, np.array([8.0, 4.0, 2.0, 1.0] + [tail] * 26))
    # what the sketch misses shrinks by (tail / 1) ** (2 x POWERS + 1): nothing; products in fp32 round by 2^-24 of 8
    rounding = 2.0**-24 * 8 * np.sqrt(shape[0] + shape[1])
    assert left_over(matrix, 4) == pytest.approx(best(matrix, 4), abs=rounding)


@pytest.mark.parametrize("rank", [1, 8, 30])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_flat_spectrum_stays_within_the_published_bound(shape: tuple[int, int], rank: int) -> None:
    """Halko et al., theorem 10.5, without its powers: sqrt(1 + rank / (oversampling - 1)) times the best."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    least = best(matrix, rank)
    assert least * (1 - 1e-6) <= left_over(matrix, rank) <= least * np.sqrt(1 + rank / (residual.OVERSAMPLING - 1))


def test_powers_bring_a_flat_spectrum_nearer_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(300, 400, generator=torch.Generator().manual_seed(2))
    with_powers = left_over(matrix, 8)
    monkeypatch.setattr(residual, "POWERS", 0)
    assert with_powers < left_over(matrix, 8)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (1, 7)])
def test_a_rank_beyond_the_matrix_is_exact_and_the_rest_is_zeros(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    b, a = residual.low_rank(matrix, 9)
    assert torch.allclose(b @ a, matrix, atol=2.0**-24 * 64)
    assert not b[:, min(shape) :].any() and not a[min(shape) :].any()


def test_the_first_directions_are_those_of_a_lower_rank() -> None:
    matrix = of_spectrum((60, 70), np.array([8.0, 4.0, 2.0, 1.0] + [1e-3] * 20))
    (b, a), (wide_b, wide_a) = residual.low_rank(matrix, 2), residual.low_rank(matrix, 10)
    assert torch.allclose(b @ a, wide_b[:, :2] @ wide_a[:2], atol=1e-5)
    # each factor has half of every singular value
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-5)


def test_the_same_bits_each_time_and_the_global_random_state_is_left_alone() -> None:
    matrix = torch.randn(40, 50)
    state = torch.get_rng_state()
    first, second = residual.low_rank(matrix, 4), residual.low_rank(matrix, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_matrix_of_zeros_has_factors_of_zeros() -> None:
    b, a = residual.low_rank(torch.zeros(30, 40), 4)
    assert not (b @ a).any() and bool(b.isfinite().all()) and bool(a.isfinite().all())

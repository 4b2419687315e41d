"""Rows of 8-bit integers times vectors of 16-bit ones, beside whole numbers of 64 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.layers.decoding.tape import isa

if isa(torch.float32) is None:
    pytest.skip("no kernels for this processor", allow_module_level=True)
from numba import njit

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.decoding import codes_bf16, int8_head

LIKE = np.zeros(1, np.uint16)
BF16 = pytest.mark.skipif(isa(torch.bfloat16) is None, reason="no kernels for bf16 here")


@njit
def rows_times_one(like, w, pieces, x, step, scales, bounds, length, sums, out, ends):  # type: ignore[no-untyped-def]
    int8_head.rows_times_one(like, w, pieces, x, step, scales, bounds, length, sums, out, ends)


@njit
def rows_times_vectors(  # type: ignore[no-untyped-def]
    like, w, n, pieces, vectors, x, row, steps, scales, bounds, lengths, sums, out, out_row, ends
):
    int8_head.rows_times_vectors(
        like, w, n, pieces, vectors, x, row, steps, scales, bounds, lengths, sums, out, out_row, ends
    )


@njit
def int8_dots(like, vectors, w, x, row, pieces, out):  # type: ignore[no-untyped-def]
    int8_head.int8_dots(like, vectors, w, x, row, pieces, out)


@BF16
def test_16_rows_times_one_vector_and_what_they_are_at_least_and_at_most() -> None:
    generator = np.random.default_rng(1)
    w, x = generator.integers(-128, 128, (16, 192), np.int8), generator.integers(-(2**14), 2**14 + 1, 192, np.int16)
    scales, bounds = (generator.random(16).astype(np.float32) for _ in range(2))
    out, ends, sums = np.zeros(16, np.float32), np.zeros((2, 16), np.float32), np.zeros(codes_bf16.SUMS, np.uint8)
    ends[0, 3] = ends[1, 3] = 1e9  # seen before
    step, length = np.float32(1e-3), np.float32(50.0)
    rows_times_one(
        LIKE, w.ctypes.data, 3, x.ctypes.data, step, scales.ctypes.data, bounds.ctypes.data, length, sums.ctypes.data,
        out.ctypes.data, ends.ctypes.data,
    )  # fmt: skip
    wanted = (w.astype(np.int64) @ x.astype(np.int64)) * float(step) * scales
    assert np.abs(out - wanted).max() < 2**-21 * np.abs(wanted).max()
    for k, sign in enumerate((-1, 1)):
        right = np.maximum(wanted + sign * bounds.astype(np.float64) * 50.0, 0.0)
        off = np.abs(ends[k] - right)
        assert off[np.arange(16) != 3].max() < 2**-20 * (np.abs(wanted).max() + 50.0)
        assert ends[k, 3] == np.float32(1e9)


@BF16
@pytest.mark.parametrize("m", [1, 2, 4, 8, 13])
@pytest.mark.parametrize("rows", [16, 11, 2, 1])
def test_rows_times_vectors_and_what_they_are_at_least_and_at_most(m: int, rows: int) -> None:
    generator = np.random.default_rng(m + rows)
    w, x = (
        generator.integers(-128, 128, (rows, 192), np.int8),
        generator.integers(-(2**14), 2**14 + 1, (m, 256), np.int16),
    )
    steps, scales, bounds, lengths = (generator.random(n).astype(np.float32) for n in (m, rows, rows, m))
    out, ends = np.full((m, 20), 7.0, np.float32), np.full((m, 2, 16), -np.inf, np.float32)
    ends[0, :, 0] = 1e9  # seen before
    sums = np.zeros(min(m, 8) * codes_bf16.SUMS, np.uint8)
    rows_times_vectors(
        LIKE, w.ctypes.data, rows, 3, m, x.ctypes.data, x.strides[0], steps.ctypes.data, scales.ctypes.data,
        bounds.ctypes.data, lengths.ctypes.data, sums.ctypes.data, out.ctypes.data, out.strides[0], ends.ctypes.data,
    )  # fmt: skip
    wanted = (x[:, :192].astype(np.int64) @ w.astype(np.int64).T) * steps[:, None].astype(np.float64) * scales
    assert np.abs(out[:, :rows] - wanted).max() < 2**-21 * np.abs(wanted).max()  # three roundings
    assert (out[:, rows:] == 7.0).all() and np.isneginf(ends[1:, :, rows:]).all()
    off = lengths[:, None].astype(np.float64) * bounds
    for k, right in enumerate((wanted - off, wanted + off)):
        assert np.abs(ends[:, k, 1:rows] - right[:, 1:]).max(initial=0.0) < 2**-20 * (np.abs(wanted).max() + 1.0)
    assert (ends[0, :, 0] == np.float32(1e9)).all()


@pytest.mark.parametrize("m", [1, 2, 4, 8, 11])
def test_a_row_times_vectors_in_fp32(m: int) -> None:
    generator = np.random.default_rng(m)
    w = generator.integers(-128, 128, 192, np.int8)
    x = generator.integers(-(2**14), 2**14 + 1, (m, 200), np.int16)
    out = np.zeros(m, np.float32)
    int8_dots(np.zeros(1, np.float32), m, w.ctypes.data, x.ctypes.data, x.strides[0], 3, out.ctypes.data)
    wanted = x[:, :192].astype(np.float64) @ w.astype(np.float64)
    size = np.linalg.norm(x[:, :192].astype(np.float64), axis=1) * np.linalg.norm(w.astype(np.float64))
    assert (np.abs(out - wanted) < 2e-6 * size).all()


@pytest.mark.skipif(not tiles.amx(), reason="no AMX")
@pytest.mark.parametrize("m", [2, 5, 16])
def test_by_amx_rows_times_vectors_are_the_same_numbers(m: int) -> None:
    from halfbyte.layers.kernels.cpu.decoding import int8_head_amx

    @njit
    def run(like, w, pieces, vectors, x, row, ordered, steps, scales, bounds, lengths, sums, out, out_row, ends):  # type: ignore[no-untyped-def]
        tiles.amx_begin(np.zeros(64, np.uint8))
        int8_head_amx.order_integers(like, x, row, vectors, pieces, ordered)
        int8_head_amx.rows_times_vectors(
            like, w, pieces, vectors, ordered, steps, scales, bounds, lengths, sums, out, out_row, ends
        )
        tiles.amx_end()

    generator = np.random.default_rng(m)
    w = generator.integers(-127, 128, (16, 192), np.int8)
    x = generator.integers(-(2**14), 2**14 + 1, (m, 256), np.int16)
    x[0, :192] = np.where(w[3] > 0, 2**14, -(2**14))  # the largest sum there is
    steps, scales, bounds, lengths = (generator.random(n).astype(np.float32) for n in (m, 16, 16, m))
    out, ends = np.full((m, 20), 7.0, np.float32), np.full((m, 2, 16), -np.inf, np.float32)
    room, ordered = np.zeros(2048, np.uint8), np.zeros(3 * int8_head_amx.PIECE_BYTES, np.uint8)
    run(
        LIKE, w.ctypes.data, 3, m, x.ctypes.data, x.strides[0], ordered.ctypes.data, steps.ctypes.data,
        scales.ctypes.data, bounds.ctypes.data, lengths.ctypes.data, room.ctypes.data, out.ctypes.data, out.strides[0],
        ends.ctypes.data,
    )  # fmt: skip
    sums = (x[:, :192].astype(np.int64) @ w.astype(np.int64).T).astype(np.float32)
    wanted = sums * steps[:, None] * scales
    assert np.array_equal(out[:, :16], wanted) and (out[:, 16:] == 7.0).all()
    off = lengths[:, None] * bounds
    assert np.array_equal(ends, np.stack([wanted - off, wanted + off], 1))

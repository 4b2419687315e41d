"""Scales of 8 bits looked up in registers, beside numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.layers.decoding.tape import isa

pytestmark = pytest.mark.skipif(isa(torch.bfloat16) is None, reason="no kernels for this processor")
LIKE = np.zeros(1, np.uint16)


@pytest.mark.parametrize(("first", "last"), [(0, 64), (0, 1), (70, 600), (256, 257), (599, 600), (0, 600)])
def test_scales_of_8_bits_are_looked_up(first: int, last: int) -> None:
    from halfbyte.layers.kernels.cpu.decoding import code_tables

    if not code_tables.has_planes():
        pytest.skip("no tables of bytes in registers")
    from numba import njit

    @njit
    def run(like, at, planes, outer, offset, first, last, out):  # type: ignore[no-untyped-def]
        code_tables.scales_of_planes(like, at, planes, outer, offset, first, last, out)

    generator = np.random.default_rng(0)
    codes, table = generator.integers(0, 256, 600, np.uint8), generator.standard_normal(256).astype(np.float32)
    outer, out = generator.standard_normal(3).astype(np.float32), np.full(1024, 7.0, np.float32)
    planes, offset = code_tables.planes(table), np.float32(0.1)
    run(LIKE, codes.ctypes.data, planes.ctypes.data, outer.ctypes.data, offset, first, last, out.ctypes.data)
    wanted = table.astype(np.float64)[codes] * outer.repeat(256)[:600] + float(offset)
    scales = out[first % 64 : first % 64 + last - first]
    assert np.abs(scales - wanted[first:last]).max() < 2**-22  # of one rounding, of numbers below 16
    assert (out[-(-last // 64) * 64 - first // 64 * 64 :] == 7.0).all()

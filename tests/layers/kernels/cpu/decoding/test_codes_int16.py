"""Products of several vectors with 4-bit rows beside sums in fp64 over the format's definition."""

from __future__ import annotations

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

from halfbyte.layers.decoding.tape import isa
from tests.layers.decoding.test_tape import DTYPES, SUMS, definition, multiplied, quantised, seen_by

pytestmark = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")


@DTYPES
@pytest.mark.parametrize(("o", "d", "nested"), [(77, 192, True), (24, 64, False), (40, 1536, True)])
def test_a_text_has_the_same_bits_whatever_stands_beside(o: int, d: int, nested: bool, dtype: torch.dtype) -> None:
    if isa(dtype) is None:
        pytest.skip("no kernels for this processor")
    layer, x = quantised(o, d, "nf4", nested, True), torch.randn(33, d)
    x[3], x[5, :64], x[6] = 0.0, 0.0, x[6] * 1e4
    wanted = seen_by(x, dtype) @ definition(layer, dtype).T
    wanted += layer.bias.detach().double().numpy()
    found = {m: multiplied(layer, x[:m], dtype) for m in (*range(1, 18), 24, 31, 33)}
    for text in range(33):
        assert np.linalg.norm(found[33][text] - wanted[text]) < 2 * SUMS * np.linalg.norm(wanted[text])
    for m, got in found.items():
        assert np.array_equal(got, found[33][:m]), m


@DTYPES
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_its_neighbours_are_as_they_were(what: float, dtype: torch.dtype) -> None:
    if isa(dtype) is None:
        pytest.skip("no kernels for this processor")
    layer, x = quantised(20, 128, "nf4", True, False), torch.randn(9, 128)
    before = multiplied(layer, x, dtype)
    x[4, 70] = what
    after = multiplied(layer, x, dtype)
    assert not np.isfinite(after[4]).any()
    others = [m for m in range(9) if m != 4]
    assert np.array_equal(after[others], before[others])


def test_the_largest_sum_of_a_block_fits() -> None:
    """Weights that are all the largest of their block times numbers that are, too: 64 x 4096 x 8191 < 2^31."""
    layer = bnb.nn.Linear4bit(128, 9, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight.data.fill_(3.0)
    layer = layer.to("cpu")
    for m in (1, 2, 4, 8, 16):
        got = multiplied(layer, torch.full((m, 128), 5.0), torch.float32)
        assert np.abs(got / (128 * 15.0) - 1).max() < 1e-6

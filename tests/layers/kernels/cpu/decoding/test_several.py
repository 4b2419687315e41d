"""Products for several vectors at once: each has the bits of one alone; rows of 8 bits beside whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.tape import Tape, isa
from halfbyte.layers.kernels.cpu.decoding import single
from halfbyte.quant.kernels import nf4_cpu
from tests.layers.decoding.test_tape import SUMS, definition, multiplied, quantised, rounded, seen_by

pytestmark = pytest.mark.skipif(isa(torch.bfloat16) is None, reason="no kernels for this processor")
LIKE = np.zeros(1, np.uint16)


@pytest.mark.parametrize(("o", "d"), [(77, 192), (1, 64), (17, 576), (40, 1536), (33, 128), (250, 320)])
@pytest.mark.parametrize("nested", [True, False])
def test_a_vector_has_the_same_bits_whatever_stands_beside(o: int, d: int, nested: bool) -> None:
    layer, x = quantised(o, d, "nf4", nested, bias=o % 2 == 0), torch.randn(19, d)
    alone = np.concatenate([multiplied(layer, x[m : m + 1], torch.bfloat16) for m in range(19)])
    add = layer.bias.detach().double().numpy() if layer.bias is not None else 0.0
    wanted = seen_by(x, torch.bfloat16) @ definition(layer, rounded(nf4_cpu.code("nf4"), torch.bfloat16)).T + add
    assert np.linalg.norm(alone - wanted) < SUMS * np.linalg.norm(wanted)
    for count in (2, 3, 4, 5, 7, 8, 9, 15, 16, 19):
        assert np.array_equal(multiplied(layer, x[:count], torch.bfloat16), alone[:count])


@pytest.mark.parametrize("m", [1, 5, 8])
def test_scales_without_tables_of_bytes_in_registers_are_the_same(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = quantised(250, 576, "nf4", True, False), torch.randn(m, 576)
    wanted, available = multiplied(layer, x, torch.bfloat16), single.available
    monkeypatch.setattr(single, "available", lambda nested: not nested and available(nested))
    assert np.array_equal(multiplied(layer, x, torch.bfloat16), wanted)


@pytest.mark.parametrize("m", [8, 11])
def test_a_product_and_lora_are_added_onto_what_is_there(m: int) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = quantised(45, 192, "nf4", True, True)

    model = get_peft_model(Holder(), LoraConfig(r=5, lora_alpha=24, target_modules=["one"]))
    layer = model.base_model.model.one
    nn.init.normal_(layer.lora_B["default"].weight)
    x, before = torch.randn(m, 192), torch.randn(m, 45)
    tape = Tape(torch.bfloat16, m)
    to, out = tape.vectors(192), tape.buffer(m, 50)[:, :45]  # rows that are further apart than they are long
    tape.norm(x, to, None)
    tape.then()
    linears.add(tape, to, [(layer, out, True)])
    out.copy_(before)
    tape.run()
    alone = multiplied(layer, x, torch.bfloat16)
    assert np.array_equal(out.double().numpy(), (torch.from_numpy(alone).float() + before).double().numpy())


@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [16, 11, 2, 1])
def test_rows_of_8_bits_and_what_they_are_at_least_and_at_most(m: int, rows: int) -> None:
    from numba import njit

    from halfbyte.layers.kernels.cpu.decoding import several

    product = getattr(several, f"eights_of_{m}")

    @njit
    def run(like, w, n, wholes, x, row, steps, scales, bounds, lengths, sums, out, out_row, found):  # type: ignore[no-untyped-def]
        product(like, w, n, wholes, x, row, steps, scales, bounds, lengths, sums, out, out_row, found)

    generator = np.random.default_rng(m + rows)
    w, x = (
        generator.integers(-128, 128, (rows, 192), np.int8),
        generator.integers(-(2**14), 2**14 + 1, (m, 256), np.int16),
    )
    steps, scales, bounds, lengths = (generator.random(n).astype(np.float32) for n in (m, rows, rows, m))
    out, found = np.full((m, 20), 7.0, np.float32), np.full((m, 2, 16), -np.inf, np.float32)
    found[0, :, 0] = 1e9  # seen before
    sums = np.zeros(m * single.SUMS, np.uint8)
    run(
        LIKE, w.ctypes.data, rows, 3, x.ctypes.data, x.strides[0], steps.ctypes.data, scales.ctypes.data,
        bounds.ctypes.data, lengths.ctypes.data, sums.ctypes.data, out.ctypes.data, out.strides[0], found.ctypes.data,
    )  # fmt: skip
    wanted = (x[:, :192].astype(np.int64) @ w.astype(np.int64).T) * steps[:, None].astype(np.float64) * scales
    assert np.abs(out[:, :rows] - wanted).max() < 2**-21 * np.abs(wanted).max()  # three roundings
    assert (out[:, rows:] == 7.0).all() and np.isneginf(found[1:, :, rows:]).all()
    off = lengths[:, None].astype(np.float64) * bounds
    for k, ends in enumerate((wanted - off, wanted + off)):
        assert np.abs(found[:, k, 1:rows] - ends[:, 1:]).max(initial=0.0) < 2**-20 * (np.abs(wanted).max() + 1.0)
    assert (found[0, :, 0] == np.float32(1e9)).all()

"""What a single vector is multiplied by, part by part, beside numpy; and that it has the bits of several at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.tape import Tape, isa
from halfbyte.layers.kernels.cpu.decoding import single
from tests.layers.decoding.test_tape import SUMS, definition, multiplied, quantised, rounded, seen_by

pytestmark = pytest.mark.skipif(isa(torch.bfloat16) is None, reason="no kernels for this processor")
LIKE = np.zeros(1, np.uint16)


@pytest.mark.parametrize(("first", "last"), [(0, 64), (0, 1), (70, 600), (256, 257), (599, 600), (0, 600)])
def test_scales_of_8_bits_are_looked_up(first: int, last: int) -> None:
    if not single.available(nested=True):
        pytest.skip("no tables of bytes in registers")
    from numba import njit

    @njit
    def run(like, at, planes, nested, offset, first, last, out):  # type: ignore[no-untyped-def]
        single.scales_of(like, at, planes, nested, offset, first, last, out)

    generator = np.random.default_rng(0)
    codes, table = generator.integers(0, 256, 600, np.uint8), generator.standard_normal(256).astype(np.float32)
    nested, out = generator.standard_normal(3).astype(np.float32), np.full(1024, 7.0, np.float32)
    planes, offset = single.planes(table), np.float32(0.1)
    run(LIKE, codes.ctypes.data, planes.ctypes.data, nested.ctypes.data, offset, first, last, out.ctypes.data)
    wanted = table.astype(np.float64)[codes] * nested.repeat(256)[:600] + float(offset)
    found = out[first % 64 : first % 64 + last - first]
    assert np.abs(found - wanted[first:last]).max() < 2**-22  # of one rounding, of numbers below 16
    assert (out[-(-last // 64) * 64 - first // 64 * 64 :] == 7.0).all()


def test_rows_of_8_bits_and_what_they_are_at_least_and_at_most() -> None:
    from numba import njit

    @njit
    def run(like, w, wholes, x, step, scales, bounds, length, sums, out, found):  # type: ignore[no-untyped-def]
        single.eights_of_16(like, w, wholes, x, step, scales, bounds, length, sums, out, found)

    generator = np.random.default_rng(1)
    w, x = generator.integers(-128, 128, (16, 192), np.int8), generator.integers(-(2**14), 2**14 + 1, 192, np.int16)
    scales, bounds = (generator.random(16).astype(np.float32) for _ in range(2))
    out, found, sums = np.zeros(16, np.float32), np.zeros((2, 16), np.float32), np.zeros(single.SUMS, np.uint8)
    found[0, 3] = found[1, 3] = 1e9  # seen before
    step, length = np.float32(1e-3), np.float32(50.0)
    run(
        LIKE, w.ctypes.data, 3, x.ctypes.data, step, scales.ctypes.data, bounds.ctypes.data, length, sums.ctypes.data,
        out.ctypes.data, found.ctypes.data,
    )  # fmt: skip
    wanted = (w.astype(np.int64) @ x.astype(np.int64)) * float(step) * scales
    assert np.abs(out - wanted).max() < 2**-21 * np.abs(wanted).max()
    for k, sign in enumerate((-1, 1)):
        ends = np.maximum(wanted + sign * bounds.astype(np.float64) * 50.0, 0.0)
        off = np.abs(found[k] - ends)
        assert off[np.arange(16) != 3].max() < 2**-20 * (np.abs(wanted).max() + 50.0)
        assert found[k, 3] == np.float32(1e9)


@pytest.mark.parametrize(("o", "d"), [(77, 192), (1, 64), (17, 576), (40, 1536), (95, 320)])
@pytest.mark.parametrize("rank", [3, 16, 40])
def test_lora_has_the_same_bits_in_one_text_as_among_several(o: int, d: int, rank: int) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = quantised(o, d, "nf4", True, True)

    model = get_peft_model(Holder(), LoraConfig(r=rank, lora_alpha=24, target_modules=["one"]))
    layer = model.base_model.model.one
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, d)
    together = multiplied(layer, x, torch.bfloat16)
    for text in range(3):
        assert np.array_equal(multiplied(layer, x[text : text + 1], torch.bfloat16)[0], together[text])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("o", "d", "nested"), [(1, 64, True), (16, 128, False), (333, 192, True), (250, 2048, True)])
def test_each_row_is_there_on_any_number_of_threads(o: int, d: int, nested: bool, threads: int) -> None:
    layer, x, before = quantised(o, d, "nf4", nested, False), torch.randn(1, d), torch.get_num_threads()
    from halfbyte.quant.kernels import nf4_cpu

    wanted = seen_by(x, torch.bfloat16) @ definition(layer, rounded(nf4_cpu.code("nf4"), torch.bfloat16)).T
    try:
        torch.set_num_threads(threads)
        got = multiplied(layer, x, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert np.linalg.norm(got - wanted) < SUMS * np.linalg.norm(wanted)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 3)])
def test_another_number_of_threads_within_a_token(first: int, then: int) -> None:
    layer, x, before = quantised(96, 192, "nf4", True, False), torch.randn(1, 192), torch.get_num_threads()
    tape = Tape(torch.bfloat16, 1)
    to, out = tape.vectors(192), tape.buffer(1, 96)
    tape.norm(x, to, None)
    tape.then()
    linears.add(tape, to, [(layer, out, False)])
    try:
        torch.set_num_threads(first)
        tape.run(0, 1)
        torch.set_num_threads(then)
        tape.run(1)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(out.double().numpy(), multiplied(layer, x, torch.bfloat16))

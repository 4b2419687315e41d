"""Products with 4-bit rows against fp64 sums over the format's definition; the order of operations among threads."""

from __future__ import annotations

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.operands import NormFormula
from halfbyte.layers.decoding.tape import Tape, isa

# bitsandbytes, `get_4bit_type`.
LEVELS = {
    "nf4": [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    "fp4": [n / 12 for n in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)],
}  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
# Sums of up to 1,536 products in fp32, in another order: 2^-24 times the root of their number, with room.
SUMS = 4e-6


def quantised(o: int, d: int, kind: str, nested: bool, bias: bool) -> nn.Module:
    torch.manual_seed(o + d)
    layer = bnb.nn.Linear4bit(d, o, bias=bias, quant_type=kind, compress_statistics=nested)
    layer.weight.data *= torch.logspace(-2, 1, o * d // 64).repeat_interleave(64).view(o, d)  # scales that differ
    return layer.to("cpu")


def definition(layer: nn.Module, dtype: torch.dtype | None = None) -> np.ndarray:
    """(O, D) in fp64: the level of each code times its block's scale; levels as the kernels of a dtype hold them."""
    levels = rounded(np.array(LEVELS[layer.weight.quant_type], np.float32), dtype)
    state = layer.weight.quant_state
    packed = layer.weight.data.reshape(-1).numpy().view(np.uint8)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    scales = state.absmax.numpy().astype(np.float64)
    if state.nested:
        outer = state.state2
        each = outer.absmax.numpy().astype(np.float64).repeat(256)[: len(scales)]
        scales = outer.code.numpy().astype(np.float64)[state.absmax.numpy()] * each + float(state.offset)
    return (levels[codes].reshape(-1, 64) * scales[:, None]).reshape(tuple(state.shape))


def rounded(levels: np.ndarray, dtype: torch.dtype | None) -> np.ndarray:
    """Levels as the kernels hold them: bf16, or in fp32 whole numbers of 1 / 4096; None: as they are defined."""
    if dtype is None:
        return levels.astype(np.float64)
    if dtype == torch.float32:
        return np.rint(levels.astype(np.float64) * 4096) / 4096
    return torch.from_numpy(levels).bfloat16().double().numpy()


def seen_by(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """x (M, D) as products see it: bf16, or in fp32 whole numbers up to 8191 with a step for each block of 64."""
    if dtype == torch.bfloat16:
        return x.to(dtype).double().numpy()
    blocks = x.numpy().reshape(-1, 64)
    peak = np.abs(blocks).max(1, keepdims=True)
    factor = np.float32(8191) / np.where(peak > 0, peak, np.float32(1))
    return (np.rint(blocks * factor) * (peak / 8191.0)).astype(np.float64).reshape(x.shape)


# Of the product as a whole, against the format's definition. bf16: levels rounded to it. fp32: a level is off by up to
# 1/8192 of the largest weight of its block, root mean square 7e-5, where weights are about 0.36 of it: 2e-4. A number
# of x is off by up to 1/16382 of the largest in its block, 2.5 times the others: 9e-5. Together 2.2e-4, with room of 2.
ROUNDED = {torch.bfloat16: 2**-8, torch.float32: 2**-11}


@DTYPES
@pytest.mark.parametrize(
    ("o", "d", "m", "kind", "nested", "bias"),
    [
        (128, 64, 1, "nf4", True, False),
        (77, 192, 3, "nf4", False, True),
        (64, 576, 7, "fp4", True, True),
        (100, 1536, 2, "nf4", True, False),
        (33, 640, 16, "nf4", True, True),
        (48, 128, 9, "fp4", False, False),
    ],
)
def test_a_product_is_that_of_the_definition(
    o: int, d: int, m: int, kind: str, nested: bool, bias: bool, dtype: torch.dtype
) -> None:
    if isa(dtype) is None:
        pytest.skip("no kernels for this processor")
    layer, x = quantised(o, d, kind, nested, bias), torch.randn(m, d)
    got = multiplied(layer, x, dtype)
    seen = seen_by(x, dtype)
    add = layer.bias.detach().double().numpy() if bias else 0.0
    wanted = seen @ definition(layer, dtype).T + add
    assert np.linalg.norm(got - wanted) < SUMS * np.linalg.norm(wanted)
    exact = x.to(dtype).double().numpy() @ definition(layer).T + add
    assert np.linalg.norm(got - exact) < ROUNDED[dtype] * np.linalg.norm(exact)


def multiplied(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> np.ndarray:
    tape = Tape(dtype, len(x))
    to, out = tape.vectors(x.shape[1]), tape.buffer(len(x), linears.Linear(tape, layer).shape[0])
    tape.norm(x, to, None)
    tape.then()
    linears.write(tape, to, [(layer, out)])
    tape.run()
    return out.double().numpy()


@DTYPES
@pytest.mark.parametrize("rank", [3, 16, 40])
def test_lora_is_added_inside(rank: int, dtype: torch.dtype) -> None:
    if isa(dtype) is None:
        pytest.skip("no kernels for this processor")
    from peft import LoraConfig, get_peft_model

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = quantised(96, 192, "nf4", True, True)

    model = get_peft_model(Holder(), LoraConfig(r=rank, lora_alpha=24, target_modules=["one"]))
    layer = model.base_model.model.one
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 192)
    got = multiplied(layer, x, dtype)
    a, b = (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
    base = seen_by(x, dtype) @ definition(layer.base_layer, dtype).T
    h = 24 / rank * x.double() @ a.to(dtype).double().T
    wanted = base + layer.base_layer.bias.detach().double().numpy() + (h @ b.to(dtype).double().T).numpy()
    assert np.linalg.norm(got - wanted) < (2**-8 if dtype == torch.bfloat16 else SUMS) * np.linalg.norm(wanted)
    with model.disable_adapter():
        alone = multiplied(layer, x, dtype)
    assert np.linalg.norm(alone - wanted) > 0.1 * np.linalg.norm(wanted)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_group_sees_what_the_one_before_has_written(threads: int) -> None:
    """A chain of 60 products, each of which needs all of the last: on more threads than there are cores too."""
    if isa(torch.float32) is None:
        pytest.skip("no kernels for this processor")
    layer, before = quantised(192, 192, "nf4", True, False), torch.get_num_threads()
    w = torch.from_numpy(definition(layer, torch.float32))
    w = w / torch.linalg.matrix_norm(w, 2)
    tape = Tape(torch.float32, 1)
    x = tape.buffer(1, 192)
    x.copy_(torch.randn(1, 192))
    wanted, now = x.double(), x
    matrix = w.float().contiguous()
    for _ in range(60):
        to, out = tape.vectors(192), tape.buffer(1, 192)
        tape.norm(now, to, NormFormula(torch.ones(192), 1e-6))
        tape.then()
        tape.dense(matrix, to.plain, out)
        tape.then()
        now = out
        wanted = torch.nn.functional.rms_norm(wanted, (192,), eps=1e-6) @ matrix.double().T
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            now.zero_()
            tape.run()
            assert torch.linalg.norm(now - wanted) < 1e-4 * torch.linalg.norm(wanted)
    finally:
        torch.set_num_threads(before)


def test_shapes_that_the_kernels_do_not_take_are_refused() -> None:
    if isa(torch.float32) is None:
        pytest.skip("no kernels for this processor")
    tape = Tape(torch.float32, 1)
    with pytest.raises(linears.Unsupported, match="shape"):
        linears.Linear(tape, bnb.nn.Linear4bit(96, 64, bias=False).to("cpu"))
    with pytest.raises(linears.Unsupported):
        linears.Linear(tape, nn.Linear(64, 64).half())


@DTYPES
@pytest.mark.parametrize(("o", "d"), [(40, 64), (9, 77), (33, 3)])
def test_a_plain_row_gives_a_vector_the_same_bits_whatever_stands_beside(o: int, d: int, dtype: torch.dtype) -> None:
    if isa(dtype) is None:
        pytest.skip("no kernels for this processor")
    torch.manual_seed(d)
    w, x = torch.randn(o, d).to(dtype), torch.randn(15, d)
    products = {m: dense(w, x[:m]) for m in (1, 2, 3, 7, 8, 15)}
    wanted = x.double() @ w.double().T
    assert torch.linalg.norm(products[15] - wanted) < SUMS * torch.linalg.norm(wanted)
    for m, out in products.items():
        assert torch.equal(out, products[15][:m])
    uses = torch.tensor([0.0, 1.0] * 8)
    some = dense(w, x, uses)
    assert torch.equal(some[1::2], products[15][1::2]) and not some[::2].any()


def dense(w: Tensor, x: Tensor, uses: Tensor | None = None) -> Tensor:
    tape = Tape(w.dtype, len(x))
    to, out = tape.vectors(x.shape[1]), tape.buffer(len(x), len(w))
    tape.norm(x, to, None)
    tape.then()
    tape.dense(w, to.plain, out, uses=uses)
    tape.run()
    return out

"""Blocks of a GGUF file through our kernels: the gguf package's own numbers, bit for bit, for every type."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from halfbyte.layers.decoding.tape import Tape, isa
from halfbyte.models.gguf.blocks import BLOCKS
from halfbyte.proofs import dequantising
from halfbyte.quant import gguf_blocks
from halfbyte.quant.kernels import gguf_cpu
from halfbyte.recipe.schema import Quant

# fp16: zeros, subnormal numbers, the largest and smallest normal ones, infinity, NaN; of e8m0 the subnormal results.
SPECIAL = (0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00)
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}


def random_blocks(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Any bytes; every other block with special scales."""
    nbytes = BLOCKS[kind][2]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * blocks, nbytes), dtype=np.uint8)
    for at in SCALES.get(kind, (0,)):
        words = np.array(SPECIAL, np.uint16)[np.arange(len(raw[::2])) % len(SPECIAL)]
        raw[::2, at : at + 2] = words.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        raw[::2, 0] = np.arange(len(raw[::2])) % 4
    return raw.reshape(rows, blocks * nbytes)


def by_package(raw: np.ndarray[Any, Any], kind: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(raw, Type[kind]))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN may be any NaN."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    both = a.isnan() == b.isnan()
    return bool((both & (a.isnan() | (a.view(bits) == b.view(bits)))).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(BLOCKS))
def test_blocks_are_the_gguf_packages_numbers(kind: str, dtype: torch.dtype) -> None:
    number, weights, nbytes = BLOCKS[kind]
    assert (int(Type[kind]), *gguf.GGML_QUANT_SIZES[Type[kind]]) == (number, weights, nbytes)
    for rows, blocks in ((1, 1), (7, 3), (130, 1), (3, 40)):
        raw = random_blocks(kind, rows, blocks, rows)
        out = torch.empty(rows, blocks * weights, dtype=dtype)
        gguf_cpu.write(torch.from_numpy(raw), kind, out)
        assert same_bits(out, by_package(raw, kind).to(dtype))
    order = torch.from_numpy(np.random.default_rng(1).permutation(rows).astype(np.int32))[:2]
    out = torch.full((2, blocks * weights), 7.0, dtype=dtype)
    gguf_cpu.write(torch.from_numpy(raw), kind, out, order)
    assert same_bits(out, by_package(raw, kind)[order.long()].to(dtype))
    scale = nbytes + (SCALES.get(kind, (0,)) or (-1,))[-1] + 1
    raw[0, scale] ^= 0x10  # another scale is seen
    gguf_cpu.write(torch.from_numpy(raw), kind, out, torch.tensor([0, 1], dtype=torch.int32))
    raw[0, scale] ^= 0x10
    assert not same_bits(out, by_package(raw, kind)[:2].to(dtype))


def layer(kind: str, rows: int, blocks: int, **orders: Any) -> tuple[Any, torch.Tensor]:
    """A layer of finite blocks, and its matrix as the file has it."""
    weights, nbytes = BLOCKS[kind][1:]
    raw = np.random.default_rng(2).integers(0, 60, (rows, blocks * nbytes), dtype=np.uint8)
    parts = gguf_blocks.parts_of([raw], (kind,), **orders)
    made = gguf_blocks.GgufBlocks("gguf").layer(parts, (rows, blocks * weights), Quant(type="gguf"), torch.float32)
    return made, by_package(raw, kind)


def test_rows_and_columns_in_another_order_forward_and_backward() -> None:
    rows, columns = np.random.default_rng(3).permutation(6), np.random.default_rng(4).permutation(64)
    made, there = layer("Q4_1", 6, 2, order=rows, columns=columns)
    weight = there[torch.from_numpy(rows)][:, torch.from_numpy(columns)]
    number_format = gguf_blocks.GgufBlocks("gguf")
    assert torch.equal(number_format.weight(made, torch.float32), weight)
    pieces = [piece.clone() for piece in number_format.pieces(made, torch.float32, 4)]
    assert [len(piece) for piece in pieces] == [4, 2] and torch.equal(torch.cat(pieces), weight)
    x = torch.randn(5, 64, requires_grad=True)
    made(x).square().sum().backward()
    expected = x.detach().requires_grad_()
    (expected @ weight.T).square().sum().backward()
    assert x.grad is not None and expected.grad is not None and torch.allclose(x.grad, expected.grad, rtol=1e-5)
    places = np.arange(6 * 64)
    assert np.array_equal(number_format.definition(made, places), weight.double().numpy().reshape(-1))


def test_a_wrong_kernel_is_seen_and_the_package_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    made, there = layer("Q5_K", 4, 1)
    model = torch.nn.ModuleList([made])
    assert dequantising.prove_dequantised(model).ok
    right = gguf_cpu.write

    def wrong(*args: Any) -> None:
        right(*args)
        args[2][-1, 70] += args[2].abs().max() / 64

    monkeypatch.setattr(gguf_cpu, "write", wrong)
    monkeypatch.setattr(gguf_blocks, "_distrusted", set())
    assert not dequantising.prove_dequantised(model).ok
    assert torch.equal(gguf_blocks.GgufBlocks("gguf").weight(made, torch.float32), there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K"])
def test_a_tape_multiplies_with_blocks(kind: str, dtype: torch.dtype) -> None:
    if isa(dtype) is None:
        pytest.skip(f"no kernels for {dtype} here")
    made, there = layer(kind, 37, 3, order=np.random.default_rng(5).permutation(37))
    rows = gguf_blocks.GgufBlocks("gguf").block_rows(made)
    assert rows is not None and rows.order is not None
    tape = Tape(dtype, 3)
    x, out = tape.buffer(3, rows.shape[1]), tape.buffer(3, 37)
    x.normal_(generator=torch.Generator().manual_seed(0))
    tape.dense(rows, x, out)
    tape.run()
    weight = there[rows.order.long()].to(dtype).double()
    bound = rows.shape[1] * 2.0**-24 * (x.double().abs() @ weight.abs().T)
    assert ((out.double() - x.double() @ weight.T).abs() <= bound).all()

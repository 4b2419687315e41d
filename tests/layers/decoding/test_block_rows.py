"""Products with a GGUF file's blocks on a tape, against fp64 sums over the gguf package's own numbers."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.tape import Tape, isa
from halfbyte.layers.kernels.cpu.decoding import block_rows
from halfbyte.models.gguf.blocks import BLOCKS
from halfbyte.quant import gguf_blocks
from halfbyte.recipe.schema import Quant
from tests.layers.decoding.test_tape import multiplied

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
# fp32 sums in another order: 2^-24 times the root of their number (4,096 at most), with room.
SUMS = 8e-6


def layer_of(kind: str, rows: int, columns: int, seed: int = 0, **orders: Any) -> tuple[nn.Module, np.ndarray]:
    """Blocks of any codes and scales that differ, and their matrix in the model's order, fp64."""
    number, weights, nbytes = BLOCKS[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * columns // weights, nbytes), dtype=np.uint8)
    for at in {"Q6_K": (208,), "MXFP4": ()}.get(kind, (0, 2) if number in (3, 7, 12, 13) else (0,)):
        scales = np.exp(rng.normal(-4, 1, len(raw))) * rng.choice([-1, 1], len(raw))
        raw[:, at : at + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(118, 124, len(raw))
    raw = raw.reshape(rows, -1)
    parts = gguf_blocks.parts_of([raw], (kind,), **orders)
    layer = gguf_blocks.GgufBlocks("gguf").layer(parts, (rows, columns), Quant(type="gguf"), torch.float32)
    values = gguf.quants.dequantize(raw, Type[kind]).astype(np.float64)
    return layer, values if orders.get("order") is None else values[orders["order"]]


def seen_by(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """x (M, D) as products see it: bf16, or whole numbers up to 32,767 with a step for each 128."""
    if dtype == torch.bfloat16:
        return x.to(dtype).double().numpy()
    padded = np.pad(x.numpy(), ((0, 0), (0, -x.shape[1] % 128))).reshape(-1, 128)
    peak = np.abs(padded).max(1, keepdims=True)
    whole = np.rint(padded * (np.float32(32767) / peak))
    return (whole * (peak / 32767.0)).astype(np.float64).reshape(len(x), -1)[:, : x.shape[1]]


@DTYPES
@pytest.mark.parametrize("kind", list(BLOCKS))
def test_a_product_is_that_of_the_packages_numbers(kind: str, dtype: torch.dtype) -> None:
    if isa(dtype) is None:
        pytest.skip("no kernels for this processor")
    sizes = [(128, 256, 1), (37, 768, 3), (1, 256, 16)]
    if BLOCKS[kind][1] == 32:
        sizes += [(16, 32, 1), (5, 96, 2), (33, 576, 7), (20, 160, 9), (18, 1504, 1)]
    for o, d, m in sizes:
        exact = block_rows.multiplies(BLOCKS[kind][0], d, str(isa(dtype)))
        order = np.random.default_rng(5).permutation(o) if m % 2 else None
        layer, weight = layer_of(kind, o, d, o + d, order=order)
        torch.manual_seed(m)
        x = torch.randn(m, d)
        got = multiplied(layer, x, dtype)
        seen = seen_by(x, dtype) if exact else x.double().numpy()
        weight = weight if exact else torch.from_numpy(weight).to(dtype).double().numpy()
        bound = SUMS * (np.abs(seen) @ np.abs(weight).T)
        assert (np.abs(got - seen @ weight.T) <= bound).all(), (kind, o, d, m)


@DTYPES
@pytest.mark.parametrize(("kind", "rank"), [("Q4_0", 16), ("Q8_0", 3), ("Q4_K", 40)])
def test_lora_and_a_bias_are_added_inside(kind: str, rank: int, dtype: torch.dtype) -> None:
    if isa(dtype) is None:
        pytest.skip("no kernels for this processor")
    from peft import LoraConfig, get_peft_model

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.weight = layer_of(kind, 95, 256)
            self.one.bias = nn.Parameter(torch.linspace(-1, 1, 95))

    holder = Holder()
    model = get_peft_model(holder, LoraConfig(r=rank, lora_alpha=24, target_modules=["one"]))
    layer = model.base_model.model.one
    nn.init.normal_(layer.lora_B["default"].weight)
    torch.manual_seed(0)
    x = torch.randn(5, 256)
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    h = 24 / rank * x.double() @ a.to(dtype).double().T
    base = seen_by(x, dtype) @ holder.weight.T + layer.base_layer.bias.detach().double().numpy()
    wanted = base + (h @ b.to(dtype).double().T).numpy()
    got = multiplied(layer, x, dtype)
    # h is rounded to bf16 once more
    assert np.linalg.norm(got - wanted) < (2**-8 if dtype == torch.bfloat16 else SUMS) * np.linalg.norm(wanted)
    with model.disable_adapter():
        alone = multiplied(layer, x, dtype)
    assert np.linalg.norm(alone - base) < SUMS * np.linalg.norm(base)


@DTYPES
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_a_vector_has_the_same_bits_whatever_stands_beside_it(kind: str, dtype: torch.dtype) -> None:
    if isa(dtype) is None:
        pytest.skip("no kernels for this processor")
    layer, _ = layer_of(kind, 50, 768)
    torch.manual_seed(1)
    x = torch.randn(15, 768)
    together = multiplied(layer, x, dtype)
    for m in (0, 8, 12, 14):
        assert np.array_equal(multiplied(layer, x[m : m + 1], dtype)[0], together[m])


def test_layers_of_several_types_read_one_vector() -> None:
    """An order each, of one x; and NF4's beside them."""
    if isa(torch.float32) is None:
        pytest.skip("no kernels for this processor")
    kinds = ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"]
    layers, weights = zip(*(layer_of(kind, 24, 256) for kind in kinds), strict=True)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    tape = Tape(torch.float32, 2)
    to, outs = tape.vectors(256), [tape.buffer(2, 24) for _ in kinds]
    tape.norm(x, to, None)
    tape.then()
    linears.write(tape, to, list(zip(layers, outs, strict=True)))
    tape.run()
    for out, weight in zip(outs, weights, strict=True):
        wanted = x.double().numpy() @ weight.T
        assert np.abs(out.double().numpy() - wanted).max() < 2**-11 * np.abs(wanted).max()

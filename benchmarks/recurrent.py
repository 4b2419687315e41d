"""How near each kernel of recurrent layers is to its bound: forward and backward of one layer, in bf16, all threads.

A bound is the longer of two times: of its FLOP at the rates of products (torch, measured here; the kernels multiply
bf16 and solve in fp32), and of its bytes at memory's rate (each operand read once, each result written once). FLOP are
those of the formulas at the top of each kernel's file. Conversations of 60 to 620 tokens, laid end to end; the best of
`--rounds`.

    python benchmarks/recurrent.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.decoding import memory_rate
from halfbyte.layers.kernels.cpu.recurrent import conv, delta_rule, gated_norm, sizes, state_space
from halfbyte.layers.recurrent import places_of

LENGTHS = (338, 97, 620, 210, 451, 60, 502, 290)
TOKENS, CHUNK = sum(LENGTHS), sizes.CHUNK
Call = Callable[[], object]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def best(call: Call, rounds: int) -> float:
    call()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def product_rate(dtype: torch.dtype, rounds: int, size: int = 2048) -> float:
    """FLOP/s of products."""
    a, b = draw(size, size, dtype=dtype), draw(size, size, dtype=dtype)
    return 2 * size**3 / best(lambda: a @ b, rounds)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def cases() -> list[tuple[str, Call, Call, float, float, float, int]]:
    """Name, forward, backward, FLOP forward, how many times that backward, the share of them in fp32, bytes forward."""
    places, starts = places_of(LENGTHS).places, places_of(LENGTHS).starts
    found: list[tuple[str, Call, Call, float, float, float, int]] = []
    for width, taps in ((1024, 3), (6144, 4)):  # LFM2-350M; before Qwen3.5-0.8B's delta rule
        x, dy = draw(TOKENS, width), draw(TOKENS, width)
        w, bias = draw(taps, width, dtype=torch.float32), torch.zeros(width)
        silu = taps == 4
        found.append((
            f"conv {width} x {taps}", lambda x=x, w=w, b=bias, s=silu: conv.forward(x, w, b, places, silu=s),
            lambda dy=dy, x=x, w=w, b=bias, s=silu: conv.backward(dy, x, w, b, places, silu=s),
            2.0 * TOKENS * width * taps, 2.0 if silu else 1.0, 1.0, size(x, dy),
        ))  # fmt: skip
    keys, heads, d, o = 16, 16, 128, 128  # Qwen3.5-0.8B
    qkv, out = draw(TOKENS, 2 * keys * d + heads * o), draw(TOKENS, heads * o)
    g, beta = -F.softplus(draw(TOKENS, heads, dtype=torch.float32)) * 0.3, torch.rand(TOKENS, heads)
    found.append((
        f"delta rule {heads} x {d} x {o}", lambda: delta_rule.forward(qkv, g, beta, starts, keys, d),
        lambda: delta_rule.backward(out, qkv, g, beta, starts, keys, d),
        float(TOKENS * heads * (6 * d * o + CHUNK * (2 * d + 2 * o))), 2.4,
        CHUNK * o / (6 * d * o + CHUNK * (2 * d + 2 * o)), size(qkv, g, beta, out),
    ))  # fmt: skip
    heads, groups, n, p = 48, 1, 128, 32  # Granite 4.0-H-350M
    xbc, y = draw(TOKENS, heads * p + 2 * groups * n), draw(TOKENS, heads * p)
    dt, skip = F.softplus(draw(TOKENS, heads, dtype=torch.float32)), torch.ones(heads)
    a = -dt * torch.linspace(0.02, 0.5, heads)
    found.append((
        f"state space {heads} x {n} x {p}", lambda: state_space.forward(xbc, a, dt, skip, starts, groups, n),
        lambda: state_space.backward(y, xbc, a, dt, skip, starts, groups, n),
        float(TOKENS * (heads * (4 * n * p + CHUNK * p) + groups * CHUNK * n)), 2.5, 0.0,
        size(xbc, a, dt, y),
    ))  # fmt: skip
    x, z, w = draw(TOKENS * 16, 128), draw(TOKENS * 16, 128), torch.ones(1, 128)
    found.append((
        "gated norm 16 x 128", lambda: gated_norm.forward(x, z, w, 1e-6, gate_first=False),
        lambda: gated_norm.backward(x, x, z, w, 1e-6, gate_first=False),
        12.0 * x.numel(), 2.0, 1.0, size(x, z, x),
    ))  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    bf16, fp32 = (product_rate(dtype, rounds) for dtype in (torch.bfloat16, torch.float32))
    memory = memory_rate()
    print(
        f"products {bf16 / 1e9:.0f} GFLOP/s in bf16, {fp32 / 1e9:.0f} in fp32; "
        f"memory {memory / 1e9:.1f} GB/s, {TOKENS} tokens"
    )
    print(f"{'ms':<28}" + "   ".join(f"{way:>9}{'bound':>8}{'by':>10}{'near':>7}" for way in ("forward", "backward")))
    for name, forward, backward, flop, times, alone, moved in cases():
        cells = [f"{name:<28}"]
        # Backward reads what forward reads and the output's gradient, and writes the gradients of what has one.
        for call, work, bytes_ in ((forward, flop, moved), (backward, flop * times, 2 * moved)):
            products = work * (1 - alone) / bf16 + work * alone / fp32
            seconds, limits = best(call, rounds), {"products": products, "memory": bytes_ / memory}
            by = max(limits, key=limits.__getitem__)
            cells.append(f"{seconds * 1e3:9.2f}{limits[by] * 1e3:8.2f}{by:>10}{limits[by] / seconds:7.0%}   ")
        print("".join(cells).rstrip(), flush=True)


if __name__ == "__main__":
    main()

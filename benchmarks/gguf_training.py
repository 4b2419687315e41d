"""A LoRA linear's forward and backward on a GGUF file's blocks beside NF4's, exact and in 8-bit integers, in turns.

python benchmarks/gguf_training.py [--threads 2]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

KINDS = ("nf4", "Q4_0", "Q8_0", "Q4_1", "Q4_K")
SHAPES = ((4096, 4096, 256, 8), (1536, 576, 512, 40), (576, 1536, 512, 40))  # out, in, tokens, rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    from halfbyte.layers.kernels.cpu.integer.products import Products, set_products

    torch.set_num_threads(args.threads)
    for o, d, n, rounds in SHAPES:
        layers = {kind: layer_of(kind, o, d) for kind in KINDS if not kind.endswith("K") or d % 256 == 0}
        given = [torch.randn(n, d).bfloat16(), torch.randn(16, d) * 0.02, torch.randn(o, 16) * 0.02]
        for products, name in ((None, "exact"), (Products(), "int8")):
            set_products(list(layers.values()), products)
            times: dict[str, list[float]] = {kind: [] for kind in layers}
            for _ in range(rounds + 2):
                for kind, layer in layers.items():
                    times[kind].append(seconds(layer, given))
            nf4 = median(times["nf4"][2:])
            each = [f"{kind} {nf4 / median(t[2:]):.2f}" for kind, t in times.items()]
            print(f"{o} x {d}, {n} tokens, {name:6} NF4 {1e3 * nf4:.2f} ms; beside it {'  '.join(each)}", flush=True)


def layer_of(kind: str, o: int, d: int) -> Any:
    import torch

    from halfbyte.quant import bnb

    if kind == "nf4":
        return bnb.quantised_linear((torch.randn(o, d) * 0.02).bfloat16())
    from tests.layers.decoding import test_block_rows

    return test_block_rows.layer_of(kind, o, d)[0]


def seconds(layer: Any, given: list[Any]) -> float:
    """Of a forward and a backward."""
    import torch

    from halfbyte.layers.lora_linear import lora_linear

    x, a, b = (part.detach().requires_grad_() for part in given)
    began = time.perf_counter()
    y = lora_linear(x, layer, a, b, 2.0, 0.05)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()

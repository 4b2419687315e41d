"""Milliseconds of a step of an answer on a GGUF file's own blocks beside NF4's, in one process, in turns.

    python benchmarks/gguf_decoding.py FILE.gguf... [--nf4 smollm2-135m] [--isa avx2] [--texts 1 8]

A row: the median step of all rounds of each base, and NF4's beside it. The head is the same in all where the files'
tensors of it are; prompts, compiling and proofs do not count.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--nf4", default="smollm2-135m")
    parser.add_argument("--isa", choices=("native", "avx2"), default="native")
    parser.add_argument("--texts", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    from benchmarks.throughput import ISA

    os.environ |= ISA[args.isa]
    import torch

    from halfbyte.inference import load

    torch.set_num_threads(args.threads)
    dtype = "fp32" if args.isa == "avx2" else "bf16"
    named = [(args.nf4, "nf4"), *((file, "gguf") for file in args.files)]
    models = [
        load.open_run(Path(name), overrides=[f"quant.compute_dtype={dtype}", f"quant.type={kind}"]).model
        for name, kind in named
    ]
    with torch.no_grad():
        for texts in args.texts:
            every: list[list[float]] = [[] for _ in models]
            for _ in range(args.rounds + 1):
                for steps, model in zip(every, models, strict=True):
                    steps.append(median(answered(model, texts)))
            nf4 = median(every[0][1:])
            for (name, kind), steps in zip(named, every, strict=True):
                each = median(steps[1:])
                print(
                    f"{texts:3} texts {kind:5} {Path(name).name:24} {1e3 * each:8.2f} ms   {nf4 / each:.2f}", flush=True
                )


def answered(model: Any, texts: int) -> list[float]:
    """Seconds of each step of an answer to each of so many prompts."""
    from halfbyte.writing.sampling import SamplingParams
    from halfbyte.writing.text import Text
    from halfbyte.writing.writer import Writer

    prompts = [[(n + k) % 30 + 100 for n in range(40)] for k in range(texts)]
    writer = Writer(model, texts, 40 + TOKENS)
    writer.insert([Text(ids, SamplingParams(TOKENS), ()) for ids in prompts])
    writer.step()
    steps = []
    for _ in range(TOKENS - 2):
        began = time.perf_counter()
        writer.step()
        steps.append(time.perf_counter() - began)
    return steps


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()

"""Tokens a second of one text, stack beside stack, on the same quantised weights, in turns.

    python benchmarks/decoding.py MODEL [--stacks ...] [--isa avx2] [--gguf FILE] [--texts 8]

MODEL: what `halfbyte generate` takes as a base, or a folder with a 4-bit checkpoint that bitsandbytes wrote
(`make_random.py llama-2-7b-nf4`). Stacks, each in its own process:

    plain           transformers and bitsandbytes, which dequantises for each token
    plain-packed    the same as it comes on AVX512-BF16: repacked at the first forward, its own 4-bit product
    own             halfbyte's model by transformers' loop
    halfbyte        halfbyte's own writer
    halfbyte-lora   the same with a LoRA of rank 16 on all linears, its weights random
    llama.cpp       a GGUF file of the model by llama.cpp's own library, from the wheel (`--gguf`)

A rate is that of the fastest WINDOW tokens in a row, of all rounds: prompts, compiling and proofs do not count, and a
machine that others use disturbs every stack less. Memory's rate is measured beside it, the best sum over an array that
no cache holds. A share of it is of the weights that a step reads; of a model with recurrent layers a second one, also
of states, each read and written. `--texts`: so many at once, by halfbyte's own stacks; a rate is that of all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STACKS = ("plain", "plain-packed", "own", "halfbyte", "halfbyte-lora")
FEW = {"plain": 10, "own": 10, "plain-packed": 24}  # tokens of a round; else MANY
MANY = 96
WINDOW = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stacks", nargs="*", default=list(STACKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=("native", "avx2"), default="native")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.worker == "llama.cpp":
            llama(args.gguf, args.rounds, args.threads)
        else:
            work(args.worker, args.model, args.rounds, args.threads, args.isa, args.texts)
        return
    from benchmarks.throughput import ISA

    environment = {**os.environ, **ISA[args.isa]}
    rows: dict[str, dict[str, Any]] = {}
    for stack in [*args.stacks, *(["llama.cpp"] if args.gguf else [])]:
        command = [sys.executable, __file__, args.model, "--worker", stack, "--rounds", str(args.rounds)]
        command += ["--threads", str(args.threads), "--isa", args.isa, "--texts", str(args.texts)]
        command += ["--gguf", str(args.gguf)] if args.gguf else []
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("@@")]
        if lines:
            rows[stack] = json.loads(lines[-1][2:])
            show(stack, rows[stack])
    print(json.dumps(rows))


def show(stack: str, row: dict[str, Any]) -> None:
    steps = row["rate"] / row.get("texts", 1)
    share = f"   {row['bytes'] / 1e9:.3f} GB a step, {row['bytes'] * steps / row['memory']:.0%} of memory's rate"
    if row.get("states"):
        share += f", {(row['bytes'] + row['states']) * steps / row['memory']:.0%} with states"
    print(f"{stack:16}{row['rate']:10.1f} tokens/s{share}   first answer {row['first']:.1f} s", flush=True)


def work(stack: str, name: str, rounds: int, threads: int, isa: str, texts: int) -> None:
    import torch

    torch.set_num_threads(threads)
    dtype = torch.float32 if isa == "avx2" else torch.bfloat16
    model, context = opened(stack, name, dtype)
    ids = torch.arange(40)[None] % 30 + 100
    model.generation_config.eos_token_id = None  # each answer has all its tokens, without another look at the logits
    with context, torch.no_grad():
        began = time.perf_counter()
        generated(model, ids, 4, stack, texts)
        first, best, many = time.perf_counter() - began, 0.0, FEW.get(stack, MANY)
        torch.set_num_threads(threads)
        for _ in range(rounds):
            at = generated(model, ids, many, stack, texts)[1:]  # the first two are the prompt and its token
            best = max(best, *(WINDOW / (at[i + WINDOW] - at[i]) for i in range(1, len(at) - WINDOW)))
    row = {"rate": best * texts, "first": first, "bytes": token_bytes(model, stack), "memory": memory_rate()}
    row |= {"texts": texts, "states": 2 * texts * state_bytes(model) if stack.startswith("halfbyte") else 0}
    print("@@" + json.dumps(row))


def llama(path: Path, rounds: int, threads: int) -> None:
    from halfbyte.proofs.programs import LlamaCpp

    began = time.perf_counter()
    program = LlamaCpp(str(path), tokens=40 + MANY, threads=threads)
    ids, first, best = [n % 30 + 100 for n in range(40)], 0.0, 0.0
    for _ in range(rounds):
        logits, at = program.logits(ids, [39]), []
        for place in range(40, 40 + MANY):
            logits = program._read([int(logits[0].argmax())], place, {0})
            first, at = first or time.perf_counter() - began, [*at, time.perf_counter()]
        best = max(best, *(WINDOW / (at[i + WINDOW] - at[i]) for i in range(len(at) - WINDOW)))
    row = {"rate": best, "first": first, "bytes": path.stat().st_size, "memory": memory_rate()}
    print("@@" + json.dumps(row))


def opened(stack: str, name: str, dtype: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from halfbyte.base.store import supply  # noqa: F401  (its caches are found before anything is timed)
    from halfbyte.inference import load

    if not stack.startswith("plain"):
        over = [f"quant.compute_dtype={'fp32' if dtype == torch.float32 else 'bf16'}"]
        lora = stack.endswith("-lora")
        run = load.open_run(Path(name), overrides=over)
        if lora:
            for key, parameter in run.model.named_parameters():
                if "lora_B" in key:
                    parameter.data.normal_(std=1e-3)
        from contextlib import nullcontext

        return run.model, nullcontext() if lora else run.using(base=True)
    folder = Path(name) if Path(name).is_dir() else store_of(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and stack == "plain":
            module.support_avx512bf16_for_cpu = False
    from contextlib import nullcontext

    return model, nullcontext()


def store_of(name: str) -> Path:
    """The base's store, which plain transformers opens as it is."""
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "quantize", name, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return Path(json.loads(done.stdout)["path"])


class Stamps:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: object) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None: ...


def generated(model: Any, ids: Any, count: int, stack: str, texts: int) -> list[float]:
    """When each token of an answer came."""
    if stack.startswith("halfbyte"):
        from halfbyte.writing.sampling import SamplingParams
        from halfbyte.writing.text import Text
        from halfbyte.writing.writer import Writer

        some = [Text([*ids[0].tolist()[i:], *ids[0].tolist()[:i]], SamplingParams(count), ()) for i in range(texts)]
        writer, at = Writer(model, texts, ids.shape[1] + count), [time.perf_counter()]
        writer.insert(some)
        while not some[0].ended:
            writer.step()
            at.append(time.perf_counter())
        return at
    stamps = Stamps()
    model.generate(
        input_ids=ids, max_new_tokens=count, do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=0,
        streamer=stamps,
    )  # fmt: skip
    return stamps.at


def token_bytes(model: Any, stack: str) -> int:
    """What a token must read: each weight of the layers and the head once, as it is held."""
    from halfbyte.models import structure
    from halfbyte.quant import bnb, policy

    lm = structure.causal_lm(model)
    inside = sum(t.nbytes for layer in structure.decoder_layers(model) for t in bnb.held_tensors(layer))
    head = lm.get_output_embeddings().weight
    eight = stack.startswith("halfbyte") and policy.head_in_eight_bits(head.nbytes, inside)
    return inside + (head.numel() if eight else head.nbytes)


def state_bytes(model: Any) -> int:
    """Of the recurrent layers, for one text."""
    from halfbyte.layers.decoding import llama

    return sum(state.nbytes for state in llama.decoder(model, 1, 64).states)


def memory_rate() -> float:
    import torch

    array, best = torch.ones(100_000_000), float("inf")
    for _ in range(20):
        began = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - began)
    return array.nbytes / best


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()

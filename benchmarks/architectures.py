"""Training speed and memory of one architecture after another: plain, halfbyte, and a Llama of equal multiply-adds.

Random models of 8 layers, 512 wide, adapters on all linears, conversations of about 338 tokens. Three processes take
turns, a round each (`stacks.py`): the plain stack and halfbyte on the architecture, halfbyte on a Llama whose layers
have as many weights in linear layers. Ratios are taken round by round, the table shows their medians.

    python benchmarks/architectures.py --only gpt2 bloom      # one type takes about a minute and a half
    python benchmarks/architectures.py --json FILE            # types that are in FILE already are not run again
    python benchmarks/architectures.py --only gpt2 --stacks halfbyte      # without the plain stack
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import make_random
from benchmarks.stacks import Case
from benchmarks.throughput import Worker

WIDTH, LAYERS, HEADS, VOCABULARY, POSITIONS = 512, 8, 8, 8192, 2048
_LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 1536, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
_WIDE = {**_LLAMA, "intermediate_size": 4 * WIDTH}
_LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * (LAYERS // 4)
_MAMBA = {"mamba_d_head": 64, "mamba_n_heads": 16, "mamba_d_state": 64, "mamba_expand": 2, "mamba_n_groups": 1}
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512}),
    "gpt2": ("GPT2Config", _GPT),
    "bloom": ("BloomConfig", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
    "gpt_neox": ("GPTNeoXConfig", _WIDE),
    "olmo2": ("Olmo2Config", _LLAMA),
    "phi": ("PhiConfig", _WIDE),
    "opt": ("OPTConfig", {**_WIDE, "ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH}),
    "falcon": ("FalconConfig", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}),
    "mpt": ("MptConfig", {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": POSITIONS}),
    "starcoder2": ("Starcoder2Config", {**_WIDE, "sliding_window": None}),
    "lfm2": (
        "Lfm2Config",
        {**_LLAMA, "block_ff_dim": 1536, "layer_types": ["conv", "conv", "conv", "full_attention"] * (LAYERS // 4)},
    ),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        {**_LLAMA, "num_key_value_heads": 2, "head_dim": 64, "layer_types": _LINEAR, "linear_num_value_heads": 8,
         "linear_num_key_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {**_LLAMA, **_MAMBA, "num_local_experts": 0, "shared_intermediate_size": 1536,
         "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2},
    ),
    "falcon_h1": ("FalconH1Config", {**_LLAMA, **_MAMBA, "mamba_d_ssm": 1024}),
}  # fmt: skip


def small(folder: Path, name: str, changes: dict[str, Any] | None = None) -> Path:
    """A checkpoint of a type in bf16 with a tokenizer of one-token words."""
    import torch
    import transformers

    cls, values = TYPES[name]
    values = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **values}
    config = getattr(transformers, cls)(**{**values, **(changes or {})})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    make_random.tokenizer().save_pretrained(folder)
    return folder


def equal_llama(folder: Path, model: Path) -> Path:
    """A Llama whose layers have as many weights in matrices as those of `model`."""
    from safetensors import safe_open

    layers = 0
    with safe_open(model / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118, not a mapping
            shape = file.get_slice(key).get_shape()
            layers += shape[0] * shape[1] if len(shape) == 2 and any(c.isdigit() for c in key.split(".")) else 0
    inner = (layers / LAYERS - 4 * WIDTH**2) / (3 * WIDTH)
    return small(folder, "llama", {"intermediate_size": round(inner / 64) * 64})


def conversations(folder: Path, count: int) -> str:
    """Rows of 60 to 620 tokens, most of them labelled; returns the file."""
    draw = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(make_random.WORDS)}" for _ in range(draw.randint(low, high)))

    path = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": words(20, 120), "completion": words(40, 500)}) + "\n" for _ in range(count)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def measure(name: str, folder: Path, rounds: int, stacks: list[str], options: tuple[str, ...]) -> dict[str, Any]:
    model = small(folder / name, name)
    data = conversations(folder, 8)
    cases = {"plain": model, "halfbyte": model, "llama": equal_llama(folder / f"{name}-llama", model)}
    workers: dict[str, Worker] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    result: dict[str, Any] = {}
    try:
        for stack in stacks:
            more = () if stack == "plain" else options
            case = Case(str(cases[stack]), data, rounds + 1, 1, 4, 2, targets="all-linear", options=more)
            try:
                workers[stack] = Worker("plain" if stack == "plain" else "halfbyte", case, {}, None)
            except SystemExit as error:
                result[stack] = {"refused": str(error)[-300:]}
        for number in range(rounds + 1):
            for stack, worker in workers.items():
                row = worker.round()
                rows.setdefault(stack, []).extend([row] if number else [])
    finally:
        for worker in workers.values():
            worker.end()
    for stack, some in rows.items():
        result[stack] = {
            "tokens_per_second": statistics.median(r["tokens"] / r["seconds"] for r in some),
            "peak_gb": max(r["peak_rss_bytes"] for r in some) / 1e9,
        }
    for stack in ("plain", "llama"):
        if stack in rows and "halfbyte" in rows:
            pairs = zip(rows["halfbyte"], rows[stack], strict=True)
            result[f"times_{stack}"] = statistics.median(
                a["tokens"] / a["seconds"] * b["seconds"] / b["tokens"] for a, b in pairs
            )
            result[f"peak_of_{stack}"] = result["halfbyte"]["peak_gb"] / result[stack]["peak_gb"]
    return result


def line(name: str, result: dict[str, Any]) -> str:
    cells = [f"{name:<18}"]
    for stack in ("plain", "halfbyte", "llama"):
        each = result.get(stack, {})
        cells.append(f"{each['tokens_per_second']:8.0f}" if "tokens_per_second" in each else f"{'-':>8}")
    cells += [f"{result[key]:8.2f}" if key in result else f"{'-':>8}" for key in ("times_plain", "times_llama")]
    for stack in ("plain", "halfbyte", "llama"):
        each = result.get(stack, {})
        cells.append(f"{each['peak_gb']:7.2f}" if "peak_gb" in each else f"{'-':>7}")
    return " ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--stacks", nargs="+", choices=["plain", "halfbyte", "llama"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="more values for halfbyte's recipe")
    parser.add_argument("--json", type=Path, help="figures are written here; what is there already is not run again")
    args = parser.parse_args()
    stacks = args.stacks or ["plain", "halfbyte", "llama"]
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    print(f"{'tokens/s of':<18} {'plain':>8} {'halfbyte':>8} {'llama':>8} {'x plain':>8} {'x llama':>8} {'GB':>7}")
    for name in args.only:
        if name not in known:
            with tempfile.TemporaryDirectory() as folder:
                known[name] = measure(name, Path(folder), args.rounds, stacks, tuple(args.set))
            if args.json:
                args.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(line(name, known[name]), flush=True)
        for stack in ("plain", "halfbyte", "llama"):
            if "refused" in known[name].get(stack, {}):
                print(f"  {stack}: {known[name][stack]['refused']}")


if __name__ == "__main__":
    main()

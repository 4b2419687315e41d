"""A large GGUF file becomes a store: how much memory of its own each process takes, sampled from /proc every 20 ms.

    python benchmarks/gguf_memory.py FOLDER                # 4 GB in Q8_0, a Llama of 3.8 billion weights
    python benchmarks/gguf_memory.py FOLDER --layers 2     # fewer of the same layers

The file's blocks are random, and it is deleted afterwards. FOLDER also holds the cache: about four times the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np

BLOCK, BLOCK_BYTES = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
WIDTH, WIDE, VOCAB, LAYERS = 4096, 11008, 32000, 18
LIMIT_BYTES = 1_000_000_000


def write_random(file: Path, layers: int) -> None:
    """A Llama's tensors; those of one shape share their bytes."""
    rng, made = np.random.default_rng(0), {}

    def blocks(rows: int, columns: int) -> np.ndarray:
        if (rows, columns) not in made:
            data = rng.integers(0, 256, (rows, columns // BLOCK, BLOCK_BYTES), np.uint8)
            data[..., :2] = np.frombuffer(np.float16(3e-4).tobytes(), np.uint8)
            made[rows, columns] = data.reshape(rows, -1)
        return made[rows, columns]

    writer = gguf.GGUFWriter(file, "llama")
    for key, value in {
        "block_count": layers, "context_length": 4096, "embedding_length": WIDTH, "feed_forward_length": WIDE,
        "attention.head_count": 32, "attention.head_count_kv": 32, "vocab_size": VOCAB,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*map(chr, range(33, 127)), "!!", *(f"t{n}" for n in range(VOCAB - 95))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH)}
    for layer in range(layers):
        parts = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH)}
        parts |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (WIDE, WIDTH), "ffn_up": (WIDE, WIDTH)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in (parts | {"ffn_down": (WIDTH, WIDE)}).items()}
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", blocks(*shape), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def private_bytes(pid: int) -> dict[str, int]:
    """Anonymous memory of a process and of all below it, by what they run."""
    found: dict[str, int] = {}
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        match = re.search(r"^RssAnon:\s*(\d+) kB", status, re.MULTILINE)
        found["conversion" if "gguf.convert" in command else "quantize"] = int(match[1]) * 1024 if match else 0
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found |= private_bytes(int(child))
    except OSError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    folder = options.folder / "gguf-memory"
    folder.mkdir(parents=True)
    try:
        file = folder / "random-Q8_0.gguf"
        write_random(file, options.layers)
        cache = {**os.environ, "HALFBYTE_CACHE": str(folder / "cache")}
        began, most = time.monotonic(), {}
        running = subprocess.Popen([sys.executable, "-m", "halfbyte", "quantize", str(file)], env=cache)
        while running.poll() is None:
            for name, nbytes in private_bytes(running.pid).items():
                most[name] = max(most.get(name, 0), nbytes)
            time.sleep(0.02)
        result = {
            "file_gb": file.stat().st_size / 1e9, "seconds": round(time.monotonic() - began, 1),
            "private_gb": {name: nbytes / 1e9 for name, nbytes in most.items()}, "exit_code": running.returncode,
        }  # fmt: skip
        print(json.dumps(result, indent=1))
        passed = running.returncode == 0 and len(most) == 2 and max(most.values()) < LIMIT_BYTES
        print("PASS" if passed else f"FAIL: each process has to stay below {LIMIT_BYTES / 1e9:.1f} GB")
        sys.exit(not passed)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

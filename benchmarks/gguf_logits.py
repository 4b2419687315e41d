"""Logits of a GGUF file's own blocks as a base beside llama.cpp's on the same file.

    python benchmarks/gguf_logits.py FILE.gguf ...
    PYTHONPATH=WHEEL python benchmarks/gguf_logits.py FILE.gguf ... --keep FOLDER    # by another build, theirs alone
    python benchmarks/gguf_logits.py FILE.gguf ... --beside FOLDER

llama.cpp rounds what a quantised matrix is multiplied with to 8 bits, which halfbyte does not. So it also reads the
same numbers as a file in F32, where it rounds nothing; and the file once more under other settings (16-bit keys and
values, flash attention, one token at a time, without repacked weights, one thread), for what it differs from itself.
Figures: the largest difference over the largest logit, mean KL in nats, and how often the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.measuring import say

TEXT = Path(__file__).resolve().parents[1] / "docs" / "glossary.md"
SETTINGS: dict[str, dict[str, Any]] = {
    "16-bit keys and values": {"type_k": 1, "type_v": 1},
    "and flash attention": {"type_k": 1, "type_v": 1, "flash_attn_type": 1},
    "one token at a time": {"n_ubatch": 1, "n_batch": 1},
    "without repacking": {"use_extra_bufts": False},
}


def by_llama_cpp(file: Path, ids: list[int], **settings: Any) -> np.ndarray:
    from halfbyte.proofs.programs import LlamaCpp

    program = LlamaCpp(str(file), tokens=len(ids), **settings)
    at_once = settings.get("n_batch", len(ids))
    pieces = [(i, ids[i : i + at_once]) for i in range(0, len(ids), at_once)]
    return np.concatenate([program._read(piece, i, set(range(len(piece)))) for i, piece in pieces])


def in_f32(file: Path, target: Path) -> Path:
    """The same model, every number written out."""
    import gguf

    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def apart(a: np.ndarray, b: np.ndarray) -> str:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))

    p, q = log_softmax(a), log_softmax(b)
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    same = (a.argmax(-1) == b.argmax(-1)).mean()
    return f"{np.abs(a - b).max() / np.abs(a).max():.2e} of the largest logit, KL {kl:.2e}, {same:.1%} the same token"


def main() -> None:
    import torch

    from halfbyte.base import load
    from halfbyte.models.sources.lookup import resolve
    from halfbyte.recipe.schema import Quant
    from halfbyte.system import device

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="write llama.cpp's logits there, and nothing else")
    parser.add_argument("--beside", type=Path, help="logits that another build of llama.cpp has kept")
    args = parser.parse_args()
    for file in args.files:
        checkpoint = resolve(str(file), in_blocks=True)
        ids = load.load_tokenizer(str(file))(TEXT.read_text(encoding="utf-8"))["input_ids"][: args.tokens]
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            np.save(args.keep / f"{file.stem}.npy", by_llama_cpp(file, ids))
            continue
        ours = {}
        for dtype in ("fp32", "bf16"):
            base = load.open_base(checkpoint, Quant(type="gguf", compute_dtype=dtype), device.detect())
            with torch.no_grad():
                ours[dtype] = base.model.eval()(torch.tensor([ids])).logits[0].float().numpy()
        with TemporaryDirectory() as folder:
            exact = by_llama_cpp(in_f32(file, Path(folder) / "f32.gguf"), ids)
        theirs = by_llama_cpp(file, ids)
        say(f"{file.name}, {len(ids)} tokens")
        say(f"  halfbyte in fp32 beside llama.cpp: {apart(theirs, ours['fp32'])}")
        say(f"  halfbyte in bf16 beside llama.cpp: {apart(theirs, ours['bf16'])}")
        say(f"  halfbyte in fp32 beside llama.cpp on the same numbers in F32: {apart(exact, ours['fp32'])}")
        say(f"  llama.cpp beside itself on the same numbers in F32: {apart(theirs, exact)}")
        if args.beside is not None:
            other = np.load(args.beside / f"{file.stem}.npy")
            say(f"  llama.cpp beside another build of it: {apart(theirs, other)}")
            say(f"  halfbyte in fp32 beside that build: {apart(other, ours['fp32'])}")
        for name, settings in SETTINGS.items():
            say(f"  llama.cpp beside itself, {name}: {apart(theirs, by_llama_cpp(file, ids, **settings))}")


if __name__ == "__main__":
    main()

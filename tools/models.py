"""`docs/models.md`: what halfbyte does with each causal LM of transformers, built small and at random.

    python -m tools.models             # what docs/models.json does not have is looked at; the page is written
    python -m tools.models --again     # everything is looked at again: some minutes

The page is made of that file, of what the exports' own tables say, and of `docs/architectures.json`, the figures that
`benchmarks/architectures.py --json docs/architectures.json` measures.
"""

import json
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from tests import plain_peft, small_models

from halfbyte.adapters import targets
from halfbyte.export import gguf, lora
from halfbyte.layers import fuse, packing
from halfbyte.models import structure
from halfbyte.proofs.packing import prove_packing
from halfbyte.types import Model
from halfbyte.writing.places import FastPathUnavailable
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text
from halfbyte.writing.writer import Writer
from tools.reference import NOTE, WELL_KNOWN, table

DOCS = Path("docs")
FACTS, FIGURES, PAGE = "models.json", "architectures.json", "models.md"
MOST_PARAMETERS, CLOSE = 5_000_000, 1e-4
PACKED = {"cu_seq_lens": "by lengths", "rows": "padded", "single": "single"}
_WORDS = """\
- **packed**: how examples share a micro-batch, as the proof at start finds it: *by lengths* (end to end, no padding),
  *padded* (rows as long as the longest), *single* (one example at a time).
- **fused**: the layers for which halfbyte's own take the place of transformers' and PEFT's in training.
- **decoded**: *tape*: a token is one list of operations, with kernels of its own; *model*: by the model's own forward.
- **exported**: `gguf`: halfbyte writes the file itself (another type by llama.cpp's converter, where it has one);
  `vllm`, `mlx`: `halfbyte export RUN --peft --for` it. `halfbyte merge` and `export --peft` take every type.
- **times plain**: tokens a second in training beside the plain stack, where it was measured."""


def facts_of(kind: str) -> dict[str, str]:
    """What is done with a type; `not built` with the reason where a small one cannot be looked at."""
    try:
        model = small_models.build(kind)
        if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
            return {"not built": "its config does not make it small"}
        chosen = targets.matched(model, targets.auto_targets(model))
        adapted = plain_peft.adapt(model, chosen)
        with structure.shallow(adapted):
            layout = prove_packing(adapted, 40).layout
    except Exception as error:  # of any kind, of upstream's code
        return {"not built": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:100].replace("|", "/")}
    counts = fuse.install(adapted).counts
    return {"packed": PACKED[layout], "fused": ", ".join(sorted(counts)), "decoded": _decoded(small_models.build(kind))}


def _decoded(model: Model) -> str:
    packing.install(model, "cu_seq_lens")
    ids = torch.randint(3, 120, (14,), generator=torch.Generator().manual_seed(1)).tolist()
    try:
        with torch.no_grad():
            writer = Writer(model, 1, 20)
            writer.insert([Text(ids, SamplingParams(1), ())])
    except FastPathUnavailable:
        return "model"
    return "tape" if writer.apart < CLOSE else "model"


def exported(kind: str) -> str:
    """The programs that are named in halfbyte's own tables."""
    own = ["gguf"] if kind in gguf.ARCHITECTURES else []
    beside = [program for program in ("vllm", "mlx") if kind in lora._LEAVES or kind in lora._WHOLE[program]]
    return ", ".join(own + beside)


def page(facts: Mapping[str, Mapping[str, str]], figures: Mapping[str, Mapping[str, object]]) -> str:
    """The page. `figures`: by type, with `times_plain` where it was measured."""
    there = {kind: each for kind, each in facts.items() if "not built" not in each}
    packed = Counter(each["packed"] for each in there.values())
    tape = sum(each["decoded"] == "tape" for each in there.values())
    rows = [
        (kind, each["packed"], each["fused"], each["decoded"], exported(kind), _times(figures.get(kind, {})))
        for kind, each in there.items()
    ]
    wholes = [(kind, exported(kind)) for kind in small_models.WHOLE]
    left = [(kind, each["not built"]) for kind, each in facts.items() if "not built" in each]
    return f"""{NOTE.replace("`make docs`", "`python -m tools.models`")}
# Models

{len(facts)} of transformers' causal LMs were looked at:
{packed["by lengths"]} are packed by lengths, {packed["padded"]} padded, {packed["single"]} single; {len(left)} could
not be built small, and say why. {tape} are decoded by the tape. A checkpoint with towers (images, sound) opens as its
language model alone, under the whole checkpoint's names; the towers are in no memory and in no store.

{_WORDS}

## Checkpoints with towers
{table(("type", "exported"), wholes)}

## Causal LMs
{table(("type", "packed", "fused", "decoded", "exported", "times plain"), rows)}

## Not looked at
{table(("type", "why"), left)}
"""


def _times(figure: Mapping[str, object]) -> str:
    times = figure.get("times_plain")
    return f"{times:.1f}" if isinstance(times, float) else ""


def read(name: str) -> dict[str, dict[str, str]]:
    path = DOCS / name
    content: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def main(arguments: list[str]) -> int:
    facts = {} if "--again" in arguments else read(FACTS)
    for kind in sorted(small_models.TYPES, key=lambda kind: kind not in WELL_KNOWN):
        if kind not in facts:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                facts[kind] = facts_of(kind)
            print(kind, facts[kind], flush=True)
            ordered = {name: facts[name] for name in small_models.TYPES if name in facts}
            (DOCS / FACTS).write_text(json.dumps(ordered, indent=0) + "\n", encoding="utf-8")
    (DOCS / PAGE).write_text(page(read(FACTS), read(FIGURES)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Greedy answers of GGUF files in llama.cpp, with and without a GGUF adapter, beside the run's and beside each other.

    python benchmarks/gguf_answers.py RUN MERGED.gguf BASE.gguf+ADAPTER.gguf ... [--prompts 48]

`as the run`: answers that are the run's, letter by letter. `as the first`: those that are the first file's. `exact`:
those that are the row's own. The run is asked as the proof of an export asks it, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import say


def main() -> None:
    from halfbyte.export.proving import proof
    from halfbyte.export.proving.reader import SAID
    from halfbyte.export.proving.witness import Asked

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("files", nargs="+", help="a GGUF file, or one and an adapter with a + between them")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--data", help="other rows than those held out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="halfbyte-answers-") as place:
        witness = proof.ask_run(Asked(args.run, place, data=args.data, prompts=args.prompts))
        asked = json.loads(witness.read_text(encoding="utf-8"))
        wanted = [text.strip() for text in asked["references"]]
        said = {"the run": [text.strip() for text in asked["texts"]]}
        for number, file in enumerate(args.files):
            path, _, adapter = file.partition("+")
            out = Path(place, str(number))
            proof.ask_program("llama.cpp", Path(path), witness, out, Path(adapter) if adapter else None)
            said[file] = [text.strip() for text in json.loads((out / SAID).read_text(encoding="utf-8"))["texts"]]
    say(f"{'':<60} as the run  as the first  exact, of {len(wanted)}")
    for name, texts in said.items():
        alike = [sum(a == b for a, b in zip(texts, other, strict=False))
                 for other in (said["the run"], said[args.files[0]], wanted)]  # fmt: skip
        say(f"{name[-60:]:<60} {alike[0]:10d} {alike[1]:13d} {alike[2]:6d}")


if __name__ == "__main__":
    main()

"""Greedy answers of GGUF files in llama.cpp, with and without a GGUF adapter, beside those of a run.

    halfbyte eval RUN --limit 48 --max-new-tokens 64
    python benchmarks/gguf_answers.py RUN MERGED.gguf BASE.gguf+ADAPTER.gguf ...

Settings of llama.cpp's stand behind an @, as `benchmarks/gguf_logits.py` names them: what it differs from itself by.
Another build of llama.cpp is another wheel in a folder that stands first on PYTHONPATH: `--keep FILE.json` keeps the
answers of the last file there, and FILE.json in the place of a file is read.
`as the run`: answers that are those of `RUN/eval/answers.jsonl`, letter by letter. `as the first`: those that are the
first file's. `exact`: those that are the row's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import say


def main() -> None:
    from benchmarks.gguf_logits import SETTINGS
    from halfbyte.data.encoding import encode
    from halfbyte.inference import target
    from halfbyte.inference.generate import end_of_turn_id
    from halfbyte.inference.load import tokenizer_of
    from halfbyte.models.sources.lookup import find_model
    from halfbyte.proofs.programs import LlamaCpp

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("files", nargs="+", help="FILE[+ADAPTER][@SETTINGS]")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, as `eval` had them")
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--keep", type=Path, help="write the last file's answers there")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    lines = (args.run / "eval/answers.jsonl").read_text(encoding="utf-8").splitlines()[: args.limit]
    rows = [json.loads(line) for line in lines]
    wanted, run = [row["expected"].strip() for row in rows], [row["adapter"]["text"].strip() for row in rows]
    found = target.find(args.run, ())
    tokenizer, names = tokenizer_of(found, find_model(found.recipe)), found.recipe.data.eval_names
    assert names
    encoded = encode.encode(names, tokenizer, found.recipe.data, cores=1).examples
    prompts = {row.where.rpartition("/")[2]: list(row.prompt_ids) for row in encoded}
    stops = [i for i in {tokenizer.eos_token_id, end_of_turn_id(tokenizer)} if i is not None]
    say(f"{'':<60} as the run  as the first  exact, of {len(rows)}")
    first: list[str] = []
    for name in (*args.files, "the run"):
        texts = run
        if name.endswith(".json"):
            texts = json.loads(Path(name).read_text(encoding="utf-8"))
        elif name != "the run":
            files, _, settings = name.partition("@")
            path, _, adapter = files.partition("+")
            program = LlamaCpp(path, adapter or None, threads=args.threads, **SETTINGS.get(settings, {}))
            texts = [program.text(program.answer(prompts[row["where"]], stops, args.tokens)).strip() for row in rows]
            if args.keep:
                args.keep.write_text(json.dumps(texts), encoding="utf-8")
        first = first or texts
        alike = [sum(a == b for a, b in zip(texts, other, strict=False)) for other in (run, first, wanted)]
        say(f"{name[-60:]:<60} {alike[0]:10d} {alike[1]:13d} {alike[2]:6d}")


if __name__ == "__main__":
    main()

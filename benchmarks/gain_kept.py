"""How much of what a run has won over its source model is left in each file that it becomes? Held-out losses of the
source, of the run, of its adapter beside the source's file, and of merged files with and without `--repair`.

All but the run's own loss are by llama.cpp's logits. What is measured is kept in `--out` and not measured again, so a
command that was stopped goes on.

    python benchmarks/gain_kept.py --run RUN --rows GSM8K/test.jsonl --out FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from halfbyte.data.encoding import encode
from halfbyte.export import witness
from halfbyte.export.export import add_tokenizer, to_gguf, to_gguf_lora
from halfbyte.export.gguf import write
from halfbyte.export.job import ExportJob, HeldOut
from halfbyte.export.weights import MergedModel
from halfbyte.inference import target
from halfbyte.inference.load import open_target, tokenizer_of
from halfbyte.inference.target import Target
from halfbyte.models.sources import pypi
from halfbyte.models.sources.lookup import find_model
from halfbyte.proofs import programs
from halfbyte.proofs.adapter import logits_at
from halfbyte.scoring.intervals import RowSums

RUN, SOURCE, BESIDE = "the run", "the source model", "adapter beside the source's file"


def held_out(run: Target, rows: Path, most: int) -> list[dict[str, Any]]:
    tokenizer = tokenizer_of(run, find_model(run.recipe))
    return witness._chosen(list(encode.encode(rows, tokenizer, run.recipe.data, cores=1).examples[:most]))


def source_file(run: Target, out: Path) -> Path:
    """The GGUF file that the source came in; else one in F16."""
    if run.recipe.model in pypi.MODELS:
        return pypi.file_of(run.recipe.model)
    if run.recipe.model.endswith(".gguf"):
        return Path(run.recipe.model)
    if not (path := out / "source-F16.gguf").is_file():
        merged = MergedModel(Target(run.path, run.recipe, None, run.run), "16bit")
        write(merged, path, "F16", add_tokenizer(run, merged))
    return path


def exported(folder: Path, make: Callable[[ExportJob], object], run: Path) -> Path:
    if not folder.is_dir():
        make(ExportJob(run, folder, prove=False))
    return next(folder.glob("*.gguf"))


def losses(name: str, arguments: argparse.Namespace, run: Target, rows: list[dict[str, Any]]) -> RowSums:
    """Of each row: by llama.cpp, or of the run by its own forward."""
    out: Path = arguments.out
    place = out / f"{name.replace(' ', '-')}-{len(rows)}"
    if not (place / programs.LOSSES).is_file():
        place.mkdir(parents=True, exist_ok=True)
        if name == RUN:
            opened = open_target(run)
            programs.observe(rows, lambda ids, at: logits_at(opened.model, ids, at).cpu().numpy(), place)
        else:
            kind, _, repair = name.partition(" ")
            adapter = exported(out / "lora", to_gguf_lora, arguments.run) if name == BESIDE else None
            if name in (SOURCE, BESIDE):
                path = source_file(run, out)
            else:
                base = "16bit" if arguments.base == "16bit" else "4bit"
                folder = out / name.replace(" ", "-")
                path = exported(folder, lambda job: to_gguf(job, kind, base, repair=bool(repair)), arguments.run)
            longest = max(len(row["ids"]) for row in rows) + 8
            opened = programs.LlamaCpp(str(path), adapter and str(adapter), longest, threads=arguments.threads)
            programs.observe(rows, opened.logits, place)
    numerators, tokens = np.load(place / programs.LOSSES).T
    return RowSums(numerators, tokens)


def lines(arguments: argparse.Namespace) -> Iterator[str]:
    run = target.find(arguments.run)
    rows = held_out(run, arguments.rows, arguments.most)
    source, own = (losses(name, arguments, run, rows) for name in (SOURCE, RUN))
    yield f"| deployed as | loss on {len(rows)} held-out rows | gain kept |"
    yield "| --- | --- | --- |"
    yield f"| {SOURCE} | {source.value:.4f} | |"
    yield f"| {RUN} | {own.value:.4f} | |"
    repaired = [f"{kind}{words}" for kind in arguments.formats for words in ("", " repaired")[: 1 + (kind != "Q8_0")]]
    for name in [*([] if arguments.no_adapter else [BESIDE]), *repaired]:
        seen = losses(name, arguments, run, rows)
        kept = HeldOut(seen, own, source, source).kept
        share = "not measured" if kept is None else f"{kept[0]:.0%} ({kept[1][0]:.0%} to {kept[1][1]:.0%})"
        yield f"| {name if name == BESIDE else f'merged, {name}'} | {seen.value:.4f} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="held out, in the run's own format")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=["Q8_0", "Q4_0", "Q4_K_M"])
    parser.add_argument("--base", choices=("16bit", "4bit"), default="16bit", help="what is merged into")
    parser.add_argument("--most", type=int, default=64, help="rows")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    parser.add_argument("--no-adapter", action="store_true", help="leave the adapter beside the source's file out")
    for line in lines(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()

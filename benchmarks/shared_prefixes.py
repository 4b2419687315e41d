"""What it saves to compute once what rows have in common: rows a second with data.share_prefixes auto and off.

Steps of one kind of rows on one model with LoRA, in turns; the best of some rounds. Each line: rows a second of both,
the ratio of their times and of the processor's, what the tokens that are not computed would be worth, and the most
memory of either way. `--rows`: steps of 16 rows of a file instead.

    python benchmarks/shared_prefixes.py smollm2-135m [--dtype bf16] [--only system] [--rows FILE --set NAME=VALUE]
    python benchmarks/shared_prefixes.py --write FOLDER    # rows that call tools, and conversations that branch
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measuring
from halfbyte.adapters.assembly import assemble
from halfbyte.base import load
from halfbyte.data import collate
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.layers import loss
from halfbyte.models.sources.lookup import find_model
from halfbyte.recipe.file import recipe_from
from halfbyte.recipe.schema import Recipe
from halfbyte.system import device, threads
from halfbyte.training import pace
from halfbyte.training.prepare import prepare
from halfbyte.training.schedule import plan_steps
from halfbyte.types import Batch, Model

# rows, tokens in common, tokens of each behind them
KINDS = {"system": (16, 448, 64), "short": (8, 40, 200), "nothing": (8, 0, 240)}
MOST = 4096  # tokens of a micro-batch
LABELLED = 32  # the last tokens of each row


def examples(rows: int, common: int, own: int) -> list[Example]:
    draw = random.Random(0)
    first = [draw.randrange(1000, 20000) for _ in range(common)]
    texts = [(*first, *(draw.randrange(1000, 20000) for _ in range(own))) for _ in range(rows)]
    return [Example(t, (*[IGNORED] * (len(t) - LABELLED), *t[-LABELLED:]), "", (), "") for t in texts]


def step(model: Model, rows: list[Example], lay_out: Callable[[list[Example]], Batch]) -> tuple[float, float]:
    """Seconds of one step, and the processor's, in as many micro-batches as `MOST` asks for."""
    began, batches = (time.perf_counter(), time.process_time()), list[list[Example]]()
    for row in rows:
        wanted = [*batches[-1], row] if batches else [row]
        if batches and lay_out(wanted)["input_ids"].numel() <= MOST:
            batches[-1] = wanted
        else:
            batches.append([row])
    for batch in batches:
        loss.micro_batch_loss(model, lay_out(batch)).backward()
    model.zero_grad()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def of_file(model: str, rows: Path, values: list[str]) -> list[Example]:
    """The rows of the first step of a run on a file."""
    recipe = recipe_from(model, str(rows), ["data.eval=none", *values]).recipe
    prepared = prepare(recipe)
    return [prepared.train.examples[row] for row in plan_steps(prepared, MOST, None).rows(0)]


def tools(count: int) -> list[dict[str, object]]:
    """Conversations that all bring the same six tools, each calls one."""
    draw, names = random.Random(1), ("weather", "calendar", "search", "mail", "route", "convert")
    fields = ("place", "day", "text", "to", "from", "unit", "limit")
    offered = [
        {"type": "function", "function": {"name": f"get_{name}", "description": f"Looks up the {name} for a user.",
         "parameters": {"type": "object", "required": list(fields[:2]), "properties": {
             field: {"type": "string", "description": f"the {field} that the {name} is for"} for field in fields[:4]}}}}
        for name in names
    ]  # fmt: skip
    rows: list[dict[str, object]] = []
    for _ in range(count):
        name, place = draw.choice(names), draw.choice(("Oslo", "Lima", "Pune", "Kyoto", "Accra"))
        called = {"name": f"get_{name}", "arguments": {"place": place, "day": str(draw.randrange(1, 29))}}
        asked = {"role": "user", "content": f"What about the {name} in {place} in {draw.randrange(2, 40)} days?"}
        answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]}
        rows.append({"messages": [asked, answer], "tools": offered})
    return rows


def branches(count: int) -> list[dict[str, object]]:
    """Conversations, each of which goes on from a turn of an earlier one."""
    draw, words = random.Random(2), "which of these is the next one to look at before we go".split()  # noqa: SIM905
    talks: list[list[dict[str, str]]] = []
    for number in range(count):
        talk = list(draw.choice(talks[-16:])[: 2 * draw.randrange(1, 4)]) if number % 8 else []
        while len(talk) < 8:
            said = " ".join(draw.choices(words, k=draw.randrange(12, 40)))
            talk.append({"role": ("user", "assistant")[len(talk) % 2], "content": said})
        talks.append(talk)
    return [{"messages": talk} for talk in talks]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"tools": tools(400), "branches": branches(400)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write)
        return
    machine = device.detect()
    threads.configure(machine.cores)
    recipe = Recipe.model_validate({
        "model": arguments.model, "quant": {"compute_dtype": arguments.dtype}, "data": {"train": "x"},
        "lora": {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0},
    })  # fmt: skip
    model = assemble(load.open_base(find_model(recipe), recipe.quant, machine), recipe).model.train()
    kinds = {name: examples(*KINDS[name]) for name in arguments.only.split(",")}
    if arguments.rows:
        kinds = {arguments.rows.stem: of_file(arguments.model, arguments.rows, arguments.set)}
    for name, given in kinds.items():
        tokens = sum(len(e.labels) for e in given)
        computed = collate.collate_tree(given)["input_ids"].numel()
        ways = {"auto": collate.collate_tree, "off": collate.collate}
        best = dict.fromkeys(ways, (float("inf"), float("inf")))
        peaks: dict[str, float] = {}
        for _ in range(arguments.rounds):
            for way, lay_out in ways.items():
                wall, cpu = step(model, given, lay_out)
                best[way] = min(best[way][0], wall), min(best[way][1], cpu)
        for way, lay_out in ways.items():
            pace.give_back()
            with measuring.watched() as memory:
                step(model, given, lay_out)
            peaks[way] = memory.anonymous / 1e9
        wall, cpu = (off / auto for off, auto in zip(best["off"], best["auto"], strict=True))
        rates = (f"{way} {len(given) / seconds[0]:.2f}" for way, seconds in best.items())
        print(
            f"{name}: {len(given)} rows, {computed} of {tokens} tokens: rows a second {', '.join(rates)}, x{wall:.3f} "
            f"(processor x{cpu:.3f}); tokens x{tokens / computed:.3f}; GB {peaks['auto']:.3f}, {peaks['off']:.3f}"
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

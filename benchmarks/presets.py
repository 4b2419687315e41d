"""What `halfbyte init --for NAME` brings: seconds of a training and the score of base and adapter, on rows made here.

    python benchmarks/presets.py                  # all of them, one after another
    python benchmarks/presets.py style tools

Each preset gets rows of its kind: the first of examples/ for tickets, json and classify, else drawn below, the same
ones every time (`random.Random.random()` alone). A line is printed for each: what is `measured` in the preset's file
and in docs/presets.md. The rows are regular and short, so a score says that the preset learns, and nothing of others.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = "smollm2-135m"
ROWS, HELD_OUT, OF_EXAMPLES = 160, 32, 240
Record = dict[str, Any]

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Karl", "Laura", "Max")
THINGS = ("lamp", "desk", "chair", "kettle", "clock", "mirror", "carpet", "bench", "shelf", "heater", "fan", "radio")
COLOURS = ("red", "blue", "green", "black", "white", "grey")
CITIES = ("Paris", "Oslo", "Rome", "Berlin", "Vienna", "Madrid", "Athens", "Dublin", "Lisbon", "Prague")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


class Draw:
    """Draws by the one method of `random` whose sequence Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def of(self, values: tuple[str, ...]) -> str:
        return values[int(self._random.random() * len(values))]

    def number(self, low: int, high: int) -> int:
        return low + int(self._random.random() * (high - low + 1))


def chat(draw: Draw) -> Record:
    """A shop's assistant, which always says its prices and asks the same way."""
    thing, colour, count = draw.of(THINGS), draw.of(COLOURS), draw.number(2, 9)
    price = 10 + len(thing) * 5
    turns = (
        f"Hello, do you have a {colour} {thing}?",
        f"Yes, we have the {thing} in {colour} for {price} euros. How many may I put aside?",
        f"{count}, please, for {draw.of(NAMES)}.",
        f"Noted: {count} x {colour} {thing}, {count * price} euros in all. Shall we send them or will you come by?",
        f"Send them to {(city := draw.of(CITIES))} by {(day := draw.of(DAYS))}.",
        f"They leave for {city} today and are there by {day}. Thank you for your order.",
    )
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}


def style(draw: Draw) -> Record:
    """A note, and the same as a house writes it."""
    name, thing, day = draw.of(NAMES), draw.of(THINGS), draw.of(DAYS)
    why = draw.of(("is late", "is broken", "is sold out", "was lost", "is ready"))
    plain = f"tell {name} the {thing} {why}, we write again on {day}"
    good = f"Dear {name},\n\nYour {thing} {why}. You hear from us on {day}.\n\nKindly, the workshop"
    return {"prompt": f"Say it as we do: {plain}", "completion": good}


def _tool(function: str, about: str, /, **parameters: str) -> Record:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": function, "description": about, "parameters": schema}}


TOOLS = [
    _tool("weather", "The weather of a city on a day", city="string", day="string"),
    _tool("order", "Order things", name="string", thing="string", count="integer"),
    _tool("remind", "Remind somebody of a thing", name="string", thing="string", day="string"),
]


def tools(draw: Draw) -> Record:
    city, day, thing, name, count = (
        draw.of(CITIES), draw.of(DAYS), draw.of(THINGS), draw.of(NAMES), draw.number(2, 9),
    )  # fmt: skip
    asks: tuple[tuple[str, str, Record], ...] = (
        (f"{name} asks if it rains in {city} on {day}.", "weather", {"city": city, "day": day}),
        (f"{name} needs {count} more of the {thing}.", "order", {"name": name, "thing": thing, "count": count}),
        (f"{name} must not forget the {thing} on {day}.", "remind", {"name": name, "thing": thing, "day": day}),
    )
    text, tool, arguments = asks[draw.number(0, 2)]
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": turns, "tools": TOOLS}


def embed(draw: Draw) -> Record:
    """A question, and the passage that answers it in other words."""
    thing, colour, city, day = draw.of(THINGS), draw.of(COLOURS), draw.of(CITIES), draw.of(DAYS)
    query = draw.of((f"{colour} {thing} in {city} on {day}?", f"can I get a {colour} {thing} {day}, I am in {city}"))
    return {"query": query, "passage": f"Our shop of {city} opens on {day}: the {thing} is there in {colour}."}


MAKERS = {"chat": chat, "style": style, "tools": tools, "embed": embed}
FILES = {"tickets": "tickets/{}.csv", "classify": "tickets/{}.csv", "json": "orders/{}.jsonl"}


def records(name: str, split: str) -> Iterator[Record]:
    """Rows of a preset that has none in examples/; none is in both splits."""
    draw, seen = Draw(2026), set[str]()
    for number in range(ROWS + HELD_OUT):
        while (text := json.dumps(record := MAKERS[name](draw))) in seen:
            pass
        seen.add(text)
        if (number >= ROWS) == (split == "test"):
            yield record


def write(name: str, folder: Path) -> Path:
    """The training rows of a preset in a folder, and the held-out ones beside them."""
    paths = {}
    for split in ("train", "test"):
        if name in FILES:
            source = ROOT / "examples" / FILES[name].format(split)
            paths[split] = folder / source.name
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
            head = source.suffix == ".csv"
            paths[split].write_text("".join(lines[: head + (OF_EXAMPLES, HELD_OUT)[split == "test"]]), encoding="utf-8")
        else:
            paths[split] = folder / f"{split}.jsonl"
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records(name, split))
            paths[split].write_text("".join(lines), encoding="utf-8")
    return paths["train"]


def halfbyte(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "halfbyte", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def scores(sheet: Record) -> str:
    """Base and adapter, in words, of what `eval --json` prints for any task."""
    parts = []
    for metric in sheet["metrics"]:
        if metric["name"].partition(".")[0] in ("perplexity", "json_valid", "json_fields", "recall_5", "recall_10",
                                                "ndcg_10", "macro_f1", "ece"):  # fmt: skip
            continue
        sides = [metric[side] for side in ("base", "adapter") if metric.get(side)]
        values = [f"{side['value']:.2f}" if "loss" in metric["name"] else f"{side['value']:.0%}" for side in sides]
        parts.append(f"{metric['name'].replace('_', ' ')} {' to '.join(values)}")
    return ", ".join(parts)


def measure(name: str, folder: Path) -> str:
    data = write(name, folder)
    halfbyte(folder, "init", "recipe.yaml", f"--model={MODEL}", f"--data={data.name}", f"--for={name}")
    began = time.monotonic()
    halfbyte(folder, "train", "recipe.yaml", "-q")
    seconds = time.monotonic() - began
    run = folder / "runs" / "train"
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    base = () if name == "classify" else ("--base",)
    sheet = json.loads(halfbyte(folder, "eval", str(run), *base, "--json"))
    rows = sum(1 for _ in data.open(encoding="utf-8")) - (data.suffix == ".csv")
    return f"{rows} rows, {report['steps']} steps: {seconds:.0f} s; {scores(sheet)} on {sheet['rows']} held-out rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*FILES, *MAKERS], help="presets; all if none")
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {measure(name, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()

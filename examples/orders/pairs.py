"""Pairs for `train.method: dpo`: an order e-mail, the JSON that it means, and the same with one mistake.

Why: the mistakes are those that a model makes after a few steps: another quantity, colour or city, an item left out, a
day that is not there. Which one a row gets is drawn from a seed; or it is what a model has answered, where that is
wrong, as `halfbyte eval RUN --data examples/orders/train.jsonl` keeps it. Standard library only.

    python examples/orders/pairs.py FOLDER       # writes pairs.jsonl and test_pairs.jsonl into it
    python examples/orders/pairs.py FOLDER RUN/eval/train/answers.jsonl     # with the mistakes of a run
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from generate import CITIES, COLOURS, DAYS

HERE = Path(__file__).parent


def mistake(order: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The order with one thing wrong."""
    items = [dict(item) for item in order["items"]]
    item = items[int(draw.random() * len(items))]
    kind = int(draw.random() * 5)
    if kind == 0 and len(items) > 1:
        return {**order, "items": items[:-1]}
    if kind == 1 and order.get("by"):
        return {**order, "by": another(DAYS, order["by"], draw)}
    if kind == 2:
        return {**order, "ship_to": another(CITIES, order["ship_to"], draw)}
    if kind == 3:
        colour, _, rest = item["item"].partition(" ")
        item["item"] = f"{another(COLOURS, colour, draw)} {rest}"
    else:
        item["qty"] += 1 + int(draw.random() * 3)
    return {**order, "items": items}


def another(values: tuple[str, ...], value: str, draw: random.Random) -> str:
    others = [other for other in values if other != value]
    return others[int(draw.random() * len(others))]


def main(folder: Path, answers: Path | None = None) -> None:
    draw = random.Random(2026)
    given: dict[str, str] = {}
    for line in answers.read_text(encoding="utf-8").splitlines() if answers is not None else ():
        row = json.loads(line)
        given[row["expected"]] = row["adapter"]["text"].strip()
    for source, target in (("train.jsonl", "pairs.jsonl"), ("test.jsonl", "test_pairs.jsonl")):
        lines = []
        for line in (HERE / source).read_text(encoding="utf-8").splitlines():
            asked, answer = json.loads(line)["messages"]
            wrong = json.dumps(mistake(json.loads(answer["content"]), draw), separators=(",", ":"))
            if given.get(answer["content"], answer["content"]) != answer["content"]:
                wrong = given[answer["content"]] or "?"
            pair = {"chosen": [answer], "rejected": [{**answer, "content": wrong}]}
            lines.append(json.dumps({"prompt": [asked], **pair}))
        (folder / target).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))

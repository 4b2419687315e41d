"""Messy order e-mails and the exact JSON they mean: 400 rows to train on, 64 held out.

Why: a small data set whose effect is plain to see. A base model answers such an e-mail with chatter; after one
pass over these rows it answers with JSON that is right to the last byte, or is counted as wrong.
Source: nothing but this file. Everything is drawn from the lists below, so there is no licence and nothing private.
Only `random.Random.random()` is used, the one method whose sequence Python promises to keep between versions.

    python examples/orders/generate.py                         # writes train.jsonl and test.jsonl beside this file
    python examples/orders/generate.py --out runs --fresh 300  # writes fresh.jsonl: so many others, as those held out
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

SEED = 2026
TRAIN_ROWS = 400
TEST_ROWS = 64

# The shop delivers to these cities. The last few customers occur only in the held-out rows.
CITIES = (
    "Paris", "London", "Rome", "Boston", "Chicago", "Oxford", "Cambridge", "Berlin", "Madrid", "Vienna", "Oslo",
    "Dallas", "Denver", "Seattle", "Toronto", "Tokyo", "Milan", "Geneva", "Miami", "Athens",
)  # fmt: skip
NAMES = (
    "Anna", "Ben", "David", "Henry", "Jack", "Maria", "Simon", "Victor", "Alice", "Daniel", "Frank", "Martin",
    "Peter", "Sarah", "Thomas", "Adam", "Chris", "Greg", "James", "Sam", "William", "Fred", "Kim", "Mark", "Tim",
    "Carl", "Edward", "Jane", "Max", "Emma", "Laura", "Grace", "Karen", "Oscar", "Julia", "Nina", "Kevin", "Emily",
    "Paul", "Alex", "Tom", "George", "Robert", "Andrew", "Joseph", "Michael", "Jim", "Elizabeth",
)  # fmt: skip
HELD_OUT_NAMES = 8

COLOURS = ("red", "blue", "green", "black", "white", "yellow")
PRODUCTS = {
    "mug": "mugs",
    "cap": "caps",
    "pen": "pens",
    "bag": "bags",
    "book": "books",
    "lamp": "lamps",
    "box": "boxes",
    "scarf": "scarves",
    "shirt": "shirts",
    "jacket": "jackets",
}
SIZED = ("shirt", "jacket")
SIZES = {"S": "small", "M": "medium", "L": "large"}
MISSPELT = {"jacket": "jaket", "jackets": "jakets", "scarves": "scarfs"}

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONTENT = {*COLOURS, *PRODUCTS, *PRODUCTS.values(), *SIZES.values(), *MISSPELT.values(), *WORDS}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")

GREETINGS = ("Hi,", "Hello,", "Hey there,", "Good morning,", "Dear team,", "Hi all,", "")
REQUESTS = (
    "please send {items} to {city}{by}.",
    "could you ship {items} to {city}{by}?",
    "I'd like {items}. Ship to {city}{by}.",
    "we need {items} in {city}{by}.",
    "can I get {items} delivered to {city}{by}?",
    "we're out of stock in {city}! Send {items}{by}.",
    "for our {city} office: {items}{by}.",
    "order for {city}{by}: {items}.",
)
BY = (" by {day}", " by end of {day}", " on {day}", " no later than {day}", " by {day} at the latest", " for {day}")
CHATTER = (
    "The last ones were great.",
    "It's for a birthday.",
    "Sorry for the rush!",
    "Call me if there's a problem.",
    "Same account as before.",
    "We love your shop.",
    "No gift wrap needed.",
)
CLOSINGS = ("Thanks, {name}", "Thank you!\n{name}", "Best,\n{name}", "Cheers, {name}", "- {name}", "{name}")


class Order(NamedTuple):
    """What the e-mail means: (name, quantity) for each item, and who, where and when."""

    customer: str
    items: tuple[tuple[str, int], ...]
    city: str
    day: str

    def to_json(self) -> str:
        """Compact, keys always in this order: the one answer that counts as right."""
        items = [{"item": item, "qty": qty} for item, qty in self.items]
        order = {"customer": self.customer, "items": items, "ship_to": self.city, "by": self.day}
        return json.dumps(order, separators=(",", ":"))


class Dice:
    """Choices made from `random()` alone, so that the files are the same under every Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def some(self, options: Sequence[T], n: int) -> list[T]:
        """`n` different ones, in any order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(n)]


def draw_order(dice: Dice, names: Sequence[str]) -> Order:
    """One order of one to three different products, each in a different quantity."""
    n_items = dice.pick((1, 1, 2, 2, 2, 2, 3))
    items: list[tuple[str, int]] = []
    products = dice.some(tuple(PRODUCTS), n_items)
    quantities = dice.some(range(1, len(WORDS) + 1), n_items)
    for product, qty in zip(products, quantities, strict=True):
        size = f" {dice.pick(tuple(SIZES))}" if product in SIZED else ""
        items.append((f"{dice.pick(COLOURS)} {product}{size}", qty))
    return Order(dice.pick(names), tuple(items), dice.pick(CITIES), dice.pick(DAYS))


def say_item(dice: Dice, item: str, qty: int) -> str:
    """`("red shirt L", 2)` -> "two red shirts (L)", "2x red shirt (large)", "2 red shirts (L)"..."""
    colour, product, *size = item.split()
    noun = product if qty == 1 else PRODUCTS[product]
    if dice.chance(0.5):
        count = "a" if qty == 1 else WORDS[qty - 1]
    elif dice.chance(0.3):
        count, noun = f"{qty}x", product
    else:
        count = str(qty)
    if noun in MISSPELT and dice.chance(0.25):
        noun = MISSPELT[noun]
    if size:
        return f"{count} {colour} {noun} ({dice.pick((size[0], SIZES[size[0]]))})"
    return dice.pick((f"{count} {noun} in {colour}", f"{count} {colour} {noun}", f"{count} {colour} {noun}"))


def mistype(dice: Dice, text: str) -> str:
    """Swap two neighbouring letters inside one long word around the items, as hasty fingers do."""
    words = text.split(" ")
    long = [i for i, w in enumerate(words) if w.isalpha() and w.islower() and len(w) >= 5 and w not in CONTENT]
    if not long:
        return text
    i = dice.pick(long)
    word = words[i]
    at = 1 + dice.below(len(word) - 3)
    words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def write_email(dice: Dice, order: Order) -> str:
    """Say the order as a person in a hurry might."""
    said = [say_item(dice, item, qty) for item, qty in order.items]
    if len(said) > 1:
        said = [*said[:-2], said[-2] + dice.pick((" and ", ", ", " plus ")) + said[-1]]
    day = order.day[:3] if dice.chance(0.3) else order.day
    by = dice.pick(BY).format(day=day)
    request = dice.pick(REQUESTS).format(items=", ".join(said), city=order.city, by=by)
    if dice.chance(0.25):
        request = mistype(dice, request)
    if dice.chance(0.45):
        request += " " + dice.pick(CHATTER)
    greeting = dice.pick(GREETINGS)
    if not greeting:
        request = request[0].upper() + request[1:]
    email = f"{greeting} {request} {dice.pick(CLOSINGS).format(name=order.customer)}".strip()
    return email.lower() if dice.chance(0.2) else email


def make(more: int = 0) -> tuple[list[tuple[str, Order]], list[tuple[str, Order]]]:
    """The (e-mail, order) pairs of both splits, the second with so many `more`; no order and no e-mail occurs twice
    anywhere."""
    dice = Dice(SEED)
    known_names, new_names = NAMES[:-HELD_OUT_NAMES], NAMES[-HELD_OUT_NAMES:]
    rows: list[tuple[str, Order]] = []
    seen: set[str | Order] = set()
    while len(rows) < TRAIN_ROWS + TEST_ROWS + more:
        training = len(rows) < TRAIN_ROWS
        names = known_names if training or dice.chance(0.5) else new_names
        order = draw_order(dice, names)
        email = write_email(dice, order)
        if order in seen or email in seen:
            continue
        seen |= {order, email}
        rows.append((email, order))
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def to_jsonl(rows: Sequence[tuple[str, Order]]) -> str:
    """One chat of two messages a line."""
    lines = []
    for email, order in rows:
        user = {"role": "user", "content": email}
        assistant = {"role": "assistant", "content": order.to_json()}
        lines.append(json.dumps({"messages": [user, assistant]}) + "\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and test.jsonl; the same bytes every time.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--fresh", type=int, default=0, help="write so many other rows instead, to fresh.jsonl")
    given = parser.parse_args()
    folder: Path = given.out
    train, test = make(given.fresh)
    if given.fresh:
        (folder / "fresh.jsonl").write_text(to_jsonl(test[TEST_ROWS:]), encoding="utf-8", newline="\n")
        return
    for name, rows in (("train.jsonl", train), ("test.jsonl", test)):
        (folder / name).write_text(to_jsonl(rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

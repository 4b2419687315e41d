"""Generated conversations of several turns: a ferry line's desk asks for what is missing, then books and adds up.

Standard library alone; the same rows for the same seed. What each turn of the assistant says follows from the turns
before: a model that learns the desk's manner and its prices knows every answer.

    python benchmarks/conversations.py 512 conversations.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

PORTS = ["Amble", "Brora", "Colonsay", "Dingle", "Elie", "Foynes", "Gairloch", "Howth", "Inver", "Jura", "Kinsale"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COUNTS = ["one", "two", "three", "four", "five", "six"]
LUGGAGE = {"a car": 28, "a bicycle": 4, "a van": 41, "a motorbike": 15, "nothing": 0}
GREETINGS = ["Hello,", "Hi there,", "Good morning,", "Good evening!", "Excuse me,", "Hey,"]
ASKS = [
    "I would like to go from {a} to {b}.", "is there a boat from {a} to {b}?", "we want to cross to {b} from {a}.",
    "can I book {a} to {b} with you?", "how do I get from {a} over to {b}?",
]  # fmt: skip
PARTIES = ["{n} of us.", "It is {n} people.", "{n}, please.", "We are {n}.", "There will be {n} of us in all."]
WHEN = ["On {d}.", "{d} would be best.", "This {d}.", "Let us say {d}.", "{d}, if there is room."]
TAKES = ["We bring {l}.", "{l}.", "Yes, {l}.", "With {l}, please.", "Just {l}."]
CHANGES = ["Sorry, I meant {d}.", "Could we make it {d} instead?", "Wait, {d} is better for us."]
FARE, WEEKEND = 12, 3


def conversation(draw: random.Random) -> list[dict[str, str]]:
    """The messages of one: where to, how many, when, with what; some change the day; then the price."""
    (a, b), number = draw.sample(PORTS, 2), draw.randint(1, len(COUNTS))
    day, luggage = draw.choice(DAYS), draw.choice([*LUGGAGE])
    people = f"{number} {'person' if number == 1 else 'people'}"
    talk = [f"{draw.choice(GREETINGS)} {draw.choice(ASKS).format(a=a, b=b)}"]
    talk += [f"Welcome to the Northern Ferry Line. From {a} to {b}: how many of you will travel?"]
    talk += [draw.choice(PARTIES).format(n=COUNTS[number - 1]).capitalize()]
    talk += [f"Noted, {people} from {a} to {b}. Which day suits you?", draw.choice(WHEN).format(d=day)]
    if draw.random() < 0.3:
        day = draw.choice([other for other in DAYS if other != day])
        talk += ["Noted. Is there anything to change before I go on?", draw.choice(CHANGES).format(d=day)]
    talk += [f"{day} it is. Do you bring a vehicle?", draw.choice(TAKES).format(l=luggage).capitalize()]
    fare = FARE + WEEKEND * (day in DAYS[5:])
    total = number * fare + LUGGAGE[luggage]
    talk += [
        f"Booked: {a} to {b}, {day}, {people}, with {luggage}. {number} x {fare} + {LUGGAGE[luggage]} = {total} euros."
    ]
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(talk)]


def write(path: Path, count: int, seed: int = 0) -> None:
    draw = random.Random(seed)
    path.write_text("".join(json.dumps({"messages": conversation(draw)}) + "\n" for _ in range(count)))


if __name__ == "__main__":
    write(Path(sys.argv[2]), int(sys.argv[1]), *map(int, sys.argv[3:]))

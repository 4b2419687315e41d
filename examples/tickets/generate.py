"""Writes the example's rows: tickets with one of twelve labels, and questions with the passage that answers each.

The same bytes every time; standard library only. No text is in both splits, and a third of the test's phrases are in no
training row. Most tickets also name something that is another label's. The passages are a shop's own manual, which
calls what customers ask for by names of its own; a quarter of them is asked for in the test alone.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
# Label -> phrases that ask for it: the last one is for the test alone.
ASKS = {
    "refund": [
        "give me my money back for {x}",
        "I want the price of {x} returned",
        "please reverse what I paid for {x}",
        "how do I get reimbursed for {x}",
        "{x} is going back, send the money to my card",
        "I expect a refund of {x}",
    ],
    "damaged": [
        "{x} arrived broken",
        "there is a crack in {x}",
        "{x} came in pieces",
        "the corner of {x} is bent",
        "{x} was scratched when I opened the box",
        "half of {x} is smashed",
    ],
    "late": [
        "where is {x}, it should be here by now",
        "{x} has not come yet",
        "I have waited two weeks for {x}",
        "{x} is overdue",
        "tracking of {x} has not moved for days",
        "when will {x} finally arrive",
    ],
    "wrong item": [
        "I got something else instead of {x}",
        "this is not {x} that I ordered",
        "you sent the wrong colour of {x}",
        "I opened the parcel and it was not {x}",
        "{x} in the box is another model",
        "someone else's {x} came to me",
    ],
    "address": [
        "send {x} to my new street",
        "I moved, deliver {x} elsewhere",
        "change where {x} goes",
        "{x} must go to my office instead",
        "the house number for {x} is wrong",
        "deliver {x} to my neighbour",
    ],
    "cancel": [
        "I do not want {x} any more",
        "stop the order of {x}",
        "please call off {x}",
        "take {x} out of my order before it ships",
        "forget about {x}, I changed my mind",
        "cancel {x}",
    ],
    "invoice": [
        "I need a bill for {x} with our tax number",
        "send the invoice of {x} again",
        "the receipt for {x} is missing",
        "accounting asks for the paperwork of {x}",
        "please put our company name on the bill of {x}",
        "I cannot find the invoice for {x}",
    ],
    "payment": [
        "my card was charged twice for {x}",
        "the payment of {x} fails",
        "your site rejects my card for {x}",
        "I paid {x} and it still says open",
        "checkout hangs when I pay for {x}",
        "the bank shows {x} two times",
    ],
    "login": [
        "I cannot get into my account to see {x}",
        "my password does not work, and I need {x}",
        "the site logs me out when I look at {x}",
        "I am locked out and want to check {x}",
        "the code to sign in never comes, I wanted {x}",
        "reset my password so that I can order {x}",
    ],
    "stock": [
        "when do you have {x} again",
        "is {x} available",
        "will {x} come back",
        "how many of {x} are left",
        "{x} is sold out, for how long",
        "can you reserve {x} once it is in",
    ],
    "manual": [
        "how do I put {x} together",
        "the instructions of {x} are missing",
        "how is {x} cleaned",
        "which battery does {x} take",
        "where is the switch on {x}",
        "a screw of {x} is left over, where does it go",
    ],
    "praise": [
        "{x} is wonderful, thank you",
        "great service with {x}",
        "I love {x}",
        "{x} came fast and looks lovely",
        "my daughter is so happy with {x}",
        "five stars for {x}",
    ],
}
THINGS = [
    "the blue lamp",
    "my desk",
    "the oak shelf",
    "two chairs",
    "the kettle",
    "a rug",
    "the garden bench",
    "my sofa",
    "the mirror",
    "the coffee mill",
    "a toaster",
    "the bookcase",
    "the wall clock",
    "four plates",
]
AROUND = ["Hi,", "Hello,", "", "Good morning,", "Dear team,", "Hey there"]
BESIDE = [
    "The invoice was fine.",
    "My payment went through.",
    "The parcel came on time.",
    "I do not need a refund.",
    "Nothing was broken.",
    "My address has not changed.",
    "I do not want to cancel.",
    "I have an account with you.",
    "The manual is clear.",
    "",
    "",
    "I like the rest of it.",
]
END = ["Thanks", "Regards, Anna", "", "Best, Tom", "Yours, Mr Lee", "Please answer soon"]


def tickets(draw: random.Random, count: int, some: slice, seen: set[str]) -> list[dict[str, str]]:
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = draw.choice([*ASKS])
        ask = draw.choice(ASKS[label][some]).format(x=draw.choice(THINGS))
        parts = [draw.choice(AROUND), *draw.sample([ask + ".", draw.choice(BESIDE)], 2), draw.choice(END)]
        if (text := " ".join(part for part in parts if part)) not in seen:
            rows[text] = label
            seen.add(text)
    return [{"text": text, "label": label} for text, label in rows.items()]


# What the shop calls the twelve things that are asked for, and the kinds of customers; how customers say what they are.
BIRDS = ["heron", "otter", "finch", "lynx", "plover", "marten", "curlew", "stoat", "dunlin", "vole", "wren", "hare"]
PROCEDURES = dict(zip(ASKS, BIRDS, strict=True))
TARIFFS = {
    "north": ["We are a school.", "I write for our college.", "It is for our pupils."],
    "south": ["We sell it on in our own store.", "I run a furniture shop.", "It is for our dealers."],
    "east": ["I bought it for myself.", "It is for my home.", "I am a private customer."],
    "west": ["It is for our office.", "Our company ordered it.", "We are a firm of ten."],
}


def passage(label: str, thing: str, tariff: str) -> str:
    form, desk = 10 + [*ASKS].index(label), 1 + THINGS.index(thing) % 5
    name = thing.split(" ", 1)[1]
    return f"Procedure {PROCEDURES[label]}, {name}, tariff {tariff}: fill in form {form}, desk {desk} decides."


def questions(draw: random.Random) -> dict[str, list[dict[str, str]]]:
    """All passages, and the questions of training and test; a third of the test's phrases are in no training row."""
    every = [(label, thing, tariff) for label in ASKS for thing in THINGS for tariff in TARIFFS]
    passages = [{"passage": passage(*one)} for one in every]
    draw.shuffle(every)
    splits: dict[str, list[dict[str, str]]] = {"passages": passages}
    tests, rest = every[: len(every) // 4], every[len(every) // 4 :]
    for name, some, phrases, kinds in (
        ("questions", rest * 2, slice(0, 5), slice(0, 2)), ("questions-test", tests, slice(3, 6), slice(1, 3)),
    ):  # fmt: skip
        splits[name] = [
            {
                "query": f"{draw.choice(ASKS[label][phrases]).format(x=thing)}. {draw.choice(TARIFFS[tariff][kinds])}",
                "passage": passage(label, thing, tariff),
            }
            for label, thing, tariff in some
        ]
    return splits


def write() -> None:
    draw, seen = random.Random(7), set[str]()
    for name, count, some in (("train", 480, slice(0, 5)), ("test", 240, slice(3, 6))):
        with (HERE / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(tickets(draw, count, some, seen))
    for name, rows in questions(random.Random(8)).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write()

"""Rows of which answer is better, in every form that others write, and every bad one by file, line and field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.reading.files import find
from halfbyte.data.reading.formats import ChatMessage, Row
from halfbyte.data.reading.read import Reader, look
from halfbyte.errors import DataError
from halfbyte.recipe.data import Data

SYSTEM = {"role": "system", "content": "be brief"}
ASK, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")))
HUMAN, GPT, GPT2 = ({"from": f, "value": v} for f, v in (("human", "2 + 2?"), ("gpt", "4"), ("gpt", "5")))


def read(path: Path, rows: list[Any], shape: str = "preference", **fields: str) -> list[Row]:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    data = Data.model_validate({"train": str(path), "format": shape, "fields": fields})
    reader = Reader(find(str(path)), data)
    read_ = list(reader)
    reader.check()
    return read_


def texts(row: Row) -> list[tuple[str, str, bool]]:
    return [(m.role, m.content, m.train) for m in row.messages or ()]


TALK = [("user", "2 + 2?", True), ("assistant", "4", True)]
FORMS: dict[str, dict[str, Any]] = {
    "explicit messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "a text and messages": {"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]},
    "implicit prompt": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "UltraFeedback": {"prompt": "2 + 2?", "prompt_id": "x", "chosen": [ASK, GOOD], "rejected": [ASK, BAD],
                      "messages": [ASK, GOOD], "score_chosen": 9.0},
    "HH": {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
    "ShareGPT": {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT2},
    "ShareGPT whole": {"chosen": [HUMAN, GPT], "rejected": [HUMAN, GPT2]},
    "Alpaca": {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
    "ranked": {"prompt": [ASK], "answers": [[GOOD], [ASK], [BAD]]},
    "scored": {"prompt": [ASK], "answers": [[BAD], [GOOD]], "scores": [1, 4.5]},
    "messages before": {"messages": [ASK], "chosen": GOOD, "rejected": BAD},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_two_rows(form: str, tmp_path: Path) -> None:
    (row,) = read(tmp_path / "a.jsonl", [FORMS[form]])
    assert row.rejected is not None and row.where == "a.jsonl:1"
    assert texts(row) == TALK
    assert texts(row.rejected) == [TALK[0], ("assistant", "5", True)]


def test_texts_stay_texts(tmp_path: Path) -> None:
    explicit = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    implicit = {"chosen": "two and two is four", "rejected": "two and two is a cup"}
    a, b = read(tmp_path / "a.jsonl", [explicit, implicit])
    assert [(r.prompt, r.completion) for r in a.texts] == [("2 + 2 =", " 4"), ("2 + 2 =", " 5")]
    assert [(r.prompt, r.completion) for r in b.texts] == [("two and two is", " four"), ("two and two is", " a cup")]


def test_what_both_begin_with_is_context(tmp_path: Path) -> None:
    chosen = [SYSTEM, ASK, GOOD, {**ASK, "content": "sure?"}, GOOD]
    (row,) = read(tmp_path / "a.jsonl", [{"chosen": chosen, "rejected": [*chosen[:-1], BAD]}])
    assert [m.train for m in row.messages or () if m.role == "assistant"] == [False, True]
    (row,) = read(tmp_path / "a.jsonl", [{"chosen": chosen, "rejected": [SYSTEM, ASK, BAD, chosen[3], GOOD]}])
    assert [m.train for m in row.messages or () if m.role == "assistant"] == [True, True]
    assert row.rejected is not None and row.rejected.messages is not None
    assert row.rejected.messages[2] == ChatMessage("assistant", "5")


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    row = {"q": "2 + 2?", "yes": "4", "no": "5", "system": "be brief"}
    (read_,) = read(tmp_path / "a.jsonl", [row], prompt="q", chosen="yes", rejected="no")
    assert texts(read_) == [("system", "be brief", True), *TALK]


VERDICTS: list[tuple[dict[str, Any], bool]] = [
    ({"prompt": "2 + 2?", "completion": "4", "label": True}, True),
    ({"prompt": [ASK], "completion": [GOOD], "label": 0}, False),
    ({"messages": [ASK, GOOD], "label": "True"}, True),
    ({"conversations": [HUMAN, GPT], "label": False}, False),
]


@pytest.mark.parametrize(("record", "good"), VERDICTS)
def test_an_answer_with_a_verdict(record: dict[str, Any], good: bool, tmp_path: Path) -> None:
    (row,) = read(tmp_path / "a.jsonl", [record], "unpaired_preference")
    assert row.desirable is good and row.rejected is None


T: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}
M: dict[str, Any] = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
BAD_ROWS: list[tuple[Any, str]] = [
    ({"prompt": "a", "rejected": "c"}, "chosen: missing; the row has 'prompt', 'rejected'"),
    ({"prompt": "a", "chosen": "b"}, "rejected: missing"),
    ({"prompt": "a", "chosen": "b", "rejcted": "c"}, "rejected: missing; the row has"),
    ({"chosen": "b", "rejected": "c"}, "prompt: missing, and chosen and rejected do not begin alike"),
    ({**T, "chosen": ""}, "chosen: empty"),
    ({**T, "rejected": "  "}, "rejected: only white space"),
    ({**T, "prompt": ""}, "prompt: empty"),
    ({**T, "chosen": None}, "chosen: a string is needed, got null"),
    ({**T, "rejected": 1.5}, "rejected: a string is needed, got the number 1.5"),
    ({**T, "prompt": 3}, "prompt: a string is needed, got the number 3"),
    ({**M, "chosen": []}, "chosen: the last message must be of the assistant"),
    ({**M, "chosen": [ASK]}, "chosen: no message has the role assistant"),
    ({**M, "rejected": [{"role": "assistant"}]}, "rejected[0].content: missing"),
    ({**M, "rejected": [{"role": "bot", "content": "5"}]}, "rejected[0].role: one of system, developer"),
    ({**M, "rejected": ["5"]}, "rejected[0]: an object with role and content is needed"),
    ({**M, "prompt": [{"role": "user", "content": ""}]}, "prompt[0].content: empty"),
    ({**M, "prompt": [{**ASK, "mood": "sad"}]}, "prompt[0]: 'mood' is not supported"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "rejected: no message has the role assistant"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]}, "one is the beginning of the other"),
    ({"prompt": "3 + 3?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "chosen: it begins with another question"),
    ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "chosen: no message has the role"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "chosen[1].content: empty"),
    ({"prompt": "a", "answers": ["b"], "scores": [1, 2]}, "needed, got a list of 1"),
    ({"prompt": "a", "answers": ["b", "c"], "scores": [1, math.nan]}, "scores[1]: a finite number is needed, got nan"),
    ({"prompt": "a", "answers": "b"}, "answers: a list of two answers or more is needed, got the string 'b'"),
    ({"prompt": "a", "answers": ["b", "c"], "scores": [1]}, "scores: a number for each of the 2 answers is needed"),
    ({"prompt": "a", "answers": ["b", "c"], "scores": [2, 2]}, "scores: all answers have the same score, 2"),
    ({"conversations": [HUMAN], "chosen": {"from": "gpt"}, "rejected": GPT2}, "chosen[0].value: missing"),
    ({"conversations": "a", "chosen": "b", "rejected": "c", "prompt": "\ud800"}, "prompt: half a surrogate pair"),
    ("[1, 2]", "object"),
    ('{"prompt": "a"', "JSON"),
]  # fmt: skip


def test_every_bad_row_is_named_once_and_all_are_collected(tmp_path: Path) -> None:
    rows = [T, *(row for row, _ in BAD_ROWS)]
    for first in range(1, len(rows), 15):  # as many are shown in full
        part = [T, *rows[first : first + 15]]
        with pytest.raises(DataError) as refused:
            read(tmp_path / "a.jsonl", part)
        lines = str(refused.value).split("\n  - ")
        assert f"{len(part) - 1} of {len(part)} rows cannot be used" in lines[0]
        for number, (_, words) in enumerate(BAD_ROWS[first - 1 : first + 14], 2):
            (line,) = [line for line in lines[1:] if f"a.jsonl:{number}" in line]
            assert words in line


@pytest.mark.parametrize(("label", "words"), [(2, "the number 2"), ("good", "the string 'good'"), (None, "null")])
def test_a_verdict_is_true_or_false(label: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"label: true or false is needed, got {words}"):
        read(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": label}], "unpaired_preference")


def test_supervised_training_says_what_to_do_with_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(T) + "\n")
    with pytest.raises(DataError) as refused:
        look(str(tmp_path / "a.jsonl"), Data(train=str(tmp_path / "a.jsonl")))
    assert "say which answer is better" in str(refused.value) and refused.value.fix == "--set train.method=dpo"

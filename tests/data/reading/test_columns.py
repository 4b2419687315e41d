"""A text with a label beside it is not trained alone unasked; an id, a date or a source beside it changes nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.reading import columns, files
from halfbyte.data.reading.read import Reader, Unclear, look
from halfbyte.errors import DataError

ROWS = 60
KINDS = ("billing", "refund", "login")
ANSWERS: dict[str, list[Any]] = {
    "label": [*KINDS] * 20,
    "Label": [*KINDS] * 20,
    "labels": [0, 1] * 30,
    "is_spam_label": [True, False] * 30,
    "ticketCategory": [*KINDS] * 20,
    "sentiment": ["positive"] * 60,
    "stars": ["1", "5", "3"] * 20,
    "answer": [f"answer number {i}" for i in range(60)],
    "summary": [f"a long summary, which is about text number {i}" for i in range(60)],
    "department": [*KINDS] * 20,
    "urgency": ["high", "low", "very low"] * 20,
}
NO_ANSWERS: dict[str, list[Any]] = {
    "id": [*range(60)],
    "ticket_id": [f"t{i}" for i in range(60)],
    "date": ["2026-01-01", "2026-01-02"] * 30,
    "created_at": ["Monday", "Tuesday"] * 30,
    "source": ["web", "mail"] * 30,
    "lang": ["en", "fr"] * 30,
    "userId": ["anna", "bob"] * 30,
    "url": ["a", "b"] * 30,
    "metadata": [{"label": "x"}] * 60,
    "meta": ['{"pile_set_name": "Github"}', '{"pile_set_name": "Books"}'] * 30,
    "split": ["train", "dev"] * 30,
    "author": ["Ann Lee", "Bo Li"] * 30,
    "language_score": [0.5, 0.7] * 30,
    "dump": ["CC-MAIN-2013-20", "CC-MAIN-2014-10"] * 30,
    "heading": [f"title {i}" for i in range(60)],
    "one": ["same"] * 60,
    "embedding": [[0.1, 0.2]] * 60,
    "empty": [None] * 60,
    "label": [None] * 60,
}


def rows(name: str, values: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"text {i}, of many words", name: value} for i, value in enumerate(values)]


@pytest.mark.parametrize("name", ANSWERS)
def test_what_looks_like_an_answer(name: str) -> None:
    assert [*columns.answering(rows(name, ANSWERS[name]), "text")] == [name]


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_does_not(name: str) -> None:
    assert columns.answering(rows(name, NO_ANSWERS[name]), "text") == {}


def test_few_rows_say_nothing_by_their_values() -> None:
    assert columns.answering(rows("department", ["a", "b"] * 9), "text") == {}


def test_both_ways_are_named_and_both_work(tmp_path: Path, make_data: Any) -> None:
    path = tmp_path / "tickets.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ticket_id", "text", "label"])
        writer.writerows([i, f"text {i}", KINDS[i % 3]] for i in range(ROWS))
    with pytest.raises(Unclear) as error:
        look(str(path), make_data())
    assert error.value.message == (
        f"{path}: text would be trained on alone, as plain text; label (billing, refund, login) looks like its answer."
    )
    assert error.value.fix == (
        "--set 'data.fields={prompt: text, completion: label}' to learn the answer; or --set data.format=text to learn "
        "the text alone"
    )
    for asked in ({"fields": {"prompt": "text", "completion": "label"}}, {"format": "text"}):
        look(str(path), make_data(**asked))
    first = next(iter(Reader(files.find(str(path)), make_data(fields={"prompt": "text", "completion": "label"}))))
    assert (first.prompt, first.completion) == ("text 0", "billing")


def test_of_several_files_the_entry_of_this_one_is_named(tmp_path: Path, make_data: Any) -> None:
    plain, labelled, asked = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    plain.write_text("a text")
    labelled.write_text("".join(json.dumps({"text": f"t{i}", "label": i % 2}) + "\n" for i in range(4)))
    asked.write_text(json.dumps({"question": "q", "answer": "a"}))
    with pytest.raises(Unclear) as error:
        look([str(plain), str(labelled)], make_data())
    entry = f"[{plain}, {{path: {labelled}, fields: {{prompt: text, completion: label}}}}]"
    ways = (
        f"in data.train or data.eval: {entry} to learn the answer; or with format: text in the place of fields to learn"
    )
    assert error.value.fix == f"{ways} the text alone"
    with pytest.raises(DataError, match="cannot tell the format") as other:
        look([str(plain), str(asked)], make_data())
    entry = f"[{plain}, {{path: {asked}, fields: {{prompt: question, completion: answer}}}}]"
    assert other.value.fix == f"say how this file is read, in data.train or data.eval: {entry}"


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("ticket_id,subject,body,priority,label", ("body", "label")),
        ("id,issue,priority", ("issue", "priority")),
        ("id,Prompt,Completion", ("Prompt", "Completion")),
    ],
)
def test_the_fix_names_columns_that_the_file_has(
    tmp_path: Path, make_data: Any, header: str, named: tuple[str, str]
) -> None:
    values = {"priority": ["high", "low"] * 30, "label": [*KINDS] * 20}
    path = tmp_path / "tickets.csv"
    lines = [
        ",".join(
            values.get(c, [f"{c}, {i} is long" if c != "id" else "1"] * ROWS)[i].replace(",", "")
            for c in header.split(",")
        )
        for i in range(ROWS)
    ]
    path.write_text("\n".join([header, *lines]))
    with pytest.raises(DataError, match="cannot tell the format") as error:
        look(str(path), make_data())
    prompt, completion = named
    sets = f"--set data.fields.prompt={prompt} --set data.fields.completion={completion}"
    assert error.value.fix == f"name the columns, as in {sets}"
    look(str(path), make_data(fields={"prompt": prompt, "completion": completion}))


def test_files_alike_need_no_entries(tmp_path: Path, make_data: Any) -> None:
    names = [str(tmp_path / f"{n}.jsonl") for n in range(3)]
    for columns_, fix in (
        ({"question", "answer"}, "name the columns, as in --set"),
        ({"text", "label"}, "--set 'data.fie"),
    ):
        for name in names:
            Path(name).write_text(json.dumps(dict.fromkeys(columns_, "a")))
        with pytest.raises(DataError) as error:
            look(names, make_data())
        assert str(error.value.fix).startswith(fix)

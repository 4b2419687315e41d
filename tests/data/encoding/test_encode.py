"""Rows on several processes: the very tokens, counts and errors of one process; small data never starts another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.encoding import encode
from halfbyte.data.reading import files, read
from halfbyte.errors import DataError

ROWS = [{"prompt": f"what is {n}", "completion": f"a number, {n % 90} " * (1 + n % 7)} for n in range(300)]
BAD = '{"prompt": 1, "completion": "b"}'


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(read, "CHUNK_ROWS", 32)
    monkeypatch.setattr(encode, "ALONE_CHUNKS", 2)
    monkeypatch.setattr(encode, "MIN_ROWS", 100)


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def jsonl(tmp_path: Path) -> tuple[str, ...]:
    talks = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(40)
    ]
    csv = ["prompt,completion", *(f"and {n},it is {n}" for n in range(70))]
    return (
        write(tmp_path / "a.jsonl", [json.dumps(row) for row in ROWS]),
        write(tmp_path / "b.jsonl", [json.dumps(row) for row in talks]),
        write(tmp_path / "c.csv", csv),
        write(tmp_path / "d.json", [json.dumps(ROWS[:50])]),
    )


def outcome(encoded: Any) -> tuple[Any, ...]:
    batches = [b.to_pydict() for b in encoded.examples.batches]
    return batches, encoded.tally, encoded.stats, encoded.examples.digests().tolist()


@pytest.mark.parametrize("overlong", ["error", "skip", "truncate"])
def test_two_processes_make_what_one_makes(
    overlong: str, tmp_path: Path, make_byte_level: Any, templates: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, tokenizer = jsonl(tmp_path), make_byte_level(templates.chatml)
    data = make_data(overlong=overlong, max_length=1024 if overlong == "error" else 60)
    alone = outcome(encode.encode(names, tokenizer, data, cores=1))
    shutil.rmtree(tmp_path / "cache")
    asked: list[bool] = []
    real = encode.Helpers._ask

    def ask(self: Any, *args: Any) -> Any:
        asked.append(True)
        return real(self, *args)

    monkeypatch.setattr(encode.Helpers, "_ask", ask)
    monkeypatch.setattr(encode.Encoder, "encode_chunk", lambda *a, **k: pytest.fail("not by a helper"))
    together = encode.encode(names, tokenizer, data, cores=2)
    assert outcome(together) == alone and len(asked) == 10 + 2 + 3 + 2
    assert sorted(p.suffix for p in encode.folder().iterdir()) == [".arrow", ".sha256"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([BAD, BAD], r"2 of 302 rows cannot be used\n  - .*a\.jsonl:301: prompt: a string is needed, got the number 1"),
        ([json.dumps({"prompt": "p", "completion": "word " * 999})], r"1 of 301 rows are longer than data\.max_length"),
    ],
)
def test_the_same_errors(
    lines: list[str], said: str, tmp_path: Path, make_byte_level: Any, templates: Any, make_data: Any
) -> None:
    name = write(tmp_path / "a.jsonl", [*map(json.dumps, ROWS), *lines])
    tokenizer, errors = make_byte_level(templates.chatml), list[str]()
    for cores in (1, 2):
        with pytest.raises(DataError, match=said) as error:
            encode.encode(name, tokenizer, make_data(), cores=cores).tally.check_length(make_data())
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    kept = sorted(p.suffix for p in encode.folder().glob("*"))
    assert kept == [".arrow", ".sha256"] * ("longer" in said), (
        "nothing is left of what cannot be read; long rows can be looked at"
    )


def test_what_cannot_be_read_is_told_before_what_cannot_be_encoded(
    tmp_path: Path, make_byte_level: Any, make_data: Any
) -> None:
    talk = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    name = write(tmp_path / "a.jsonl", [talk] * 40 + ["{"] + [talk] * 40 + ["["])
    with pytest.raises(DataError, match="2 of 82 rows cannot be used"):
        encode.encode(name, make_byte_level(), make_data())


def ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode.sys, "executable", shutil.which("false"))


def cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode.sys, "executable", "/nowhere/python")


def cannot_be_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def dumps(value: Any) -> bytes:
        raise TypeError("cannot pickle")

    monkeypatch.setattr(encode.pickle, "dumps", dumps)


@pytest.mark.parametrize("harm", [ends_early, cannot_start, cannot_be_handed_over])
def test_a_helper_that_does_not_help_is_done_without(
    harm: Any, tmp_path: Path, make_byte_level: Any, templates: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, tokenizer = write(tmp_path / "a.jsonl", [*map(json.dumps, ROWS)]), make_byte_level(templates.chatml)
    alone = outcome(encode.encode(name, tokenizer, make_data(), cores=1))
    shutil.rmtree(tmp_path / "cache")
    harm(monkeypatch)
    assert outcome(encode.encode(name, tokenizer, make_data(), cores=2)) == alone


def test_few_rows_start_no_process(
    tmp_path: Path, make_byte_level: Any, templates: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "Helpers", lambda *args: pytest.fail("a process was started"))
    name = write(tmp_path / "a.jsonl", [json.dumps(row) for row in ROWS[:64]])
    encoded = encode.encode(name, make_byte_level(templates.chatml), make_data(), cores=2)
    assert len(encoded.examples) == 64


def test_large_rows_come_in_small_chunks(tmp_path: Path, make_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "CHUNK_BYTES", 1000)
    row = json.dumps({"prompt": "a", "completion": "b" * 400})
    for name, text in (("a.jsonl", [row] * 7), ("a.json", [f"[{', '.join([row] * 7)}]"])):
        reader = read.Reader(files.find(write(tmp_path / name, text)), make_data())
        assert [len(chunk.records) for chunk in reader.chunks()] == [3, 3, 1]


def test_rows_without_a_name_are_mapped_and_leave_nothing(
    tmp_path: Path, make_byte_level: Any, templates: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, tokenizer = write(tmp_path / "a.jsonl", [*map(json.dumps, ROWS)]), make_byte_level(templates.chatml)
    kept = outcome(encode.encode(name, tokenizer, make_data()))
    monkeypatch.setattr(encode, "key", lambda *args: None)
    mapped: list[Path] = []
    real = encode._map
    monkeypatch.setattr(encode, "_map", lambda path: mapped.append(path) or real(path))
    assert outcome(encode.encode(name, tokenizer, make_data())) == kept
    assert len(mapped) == 1 and not mapped[0].exists()
    assert len(list(encode.folder().glob("*.arrow"))) == 1

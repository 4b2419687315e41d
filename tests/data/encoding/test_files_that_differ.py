"""Files of one run that are read each in its own way: the tokens of each are those of a run over it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.encoding import encode
from halfbyte.data.encoding.chatml import is_needed
from halfbyte.data.reading import files, read
from halfbyte.errors import DataError
from halfbyte.recipe.data import Data, DataEntry

TALK = [
    {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]  # fmt: skip
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pairs.jsonl": ({"prompt": "a", "completion": "b"}, {}),
    "asked.jsonl": ({"question": "c", "answer": "d"}, {"fields": {"prompt": "question", "completion": "answer"}}),
    "all.jsonl": ({"prompt": "e", "completion": "f"}, {"mask": "all"}),
    "talks.jsonl": ({"messages": TALK}, {"mask": "assistant", "chat_template": "chatml-tools"}),
    "labelled.jsonl": ({"text": "g", "label": "h"}, {"format": "text"}),
}


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | dict[str, Any]]:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    for name, (row, _) in FILES.items():
        (tmp_path / name).write_text("".join(json.dumps(row | {"id": i}) + "\n" for i in range(3)))
    return [{"path": str(tmp_path / n), **how} if how else str(tmp_path / n) for n, (_, how) in FILES.items()]


@pytest.mark.parametrize("cores", [1, 2])
def test_each_file_gives_the_tokens_of_a_run_of_its_own(
    entries: list[str | dict[str, Any]], tmp_path: Path, make_byte_level: Any, templates: Any, cores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(encode, "ALONE_CHUNKS", 2)
    tokenizer, data = make_byte_level(templates.chatml, eos="<|im_end|>"), Data(train=entries)  # type: ignore[arg-type]
    read.look(data.train, data)
    alone = [
        encode.encode(str(tmp_path / name), tokenizer, Data(train=str(tmp_path / name), **how))
        for name, (_, how) in FILES.items()
    ]
    together = encode.encode(data.train, tokenizer, data, cores=cores)
    expected = [(list(e.input_ids), list(e.labels)) for rows in alone for e in rows.examples]
    assert [(list(e.input_ids), list(e.labels)) for e in together.examples] == expected
    assert len({labels[0] for _, labels in expected}) == 1 and len(expected) == 15
    assert read.unread(data.train, data)[0] == "pairs.jsonl is read as prompt_completion; not read of it: id"


def test_an_entry_is_stronger_than_a_glob_and_keeps_its_place(entries: list[Any], tmp_path: Path) -> None:
    asked = DataEntry.model_validate(entries[1])
    sources = files.find([str(tmp_path / "*.jsonl"), asked])
    assert [s.label for s in sources] == sorted(FILES)
    assert [s.entry for s in sources] == [None, asked, None, None, None]


def test_another_way_of_reading_is_another_file_in_the_cache(entries: list[Any], make_byte_level: Any) -> None:
    tokenizer, path, data = make_byte_level("{{ messages }}"), entries[0], Data(train="unread")
    ways = [{}, {"mask": "all"}, {"format": "text"}, {"chat_template": "chatml"}, {"chat_template": "qwen-tools"}]
    keys = [encode.key([DataEntry(path=path, **way)], tokenizer, data) for way in ways]  # type: ignore[arg-type]
    assert None not in keys and len(set(keys)) == len(ways)


def test_a_file_with_a_template_of_its_own_needs_no_chatml(entries: list[Any], make_byte_level: Any) -> None:
    tokenizer = make_byte_level(None)
    talks = Data(train=[entries[3]])  # type: ignore[arg-type]
    assert not is_needed(talks.train, tokenizer, talks)
    assert is_needed(entries[3]["path"], tokenizer, talks)


def test_tokens_that_are_not_there_are_named(entries: list[Any], make_byte_level: Any) -> None:
    data = Data(train=[entries[3]])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"chatml-tools writes .*, which this tokenizer has not"):
        encode.encode(data.train, make_byte_level("{{ messages }}", special=()), data)

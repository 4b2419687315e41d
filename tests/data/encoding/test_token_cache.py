"""The cache of tokens: the same rows, mapped; anything that changes a token is another file; nothing half is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.encoding import encode, encoder

ROWS = [{"prompt": f"what is {n}", "completion": f"a number, {n}"} for n in range(7)]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encode, "MIN_ROWS", 1)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_the_second_time_nothing_is_tokenised_and_all_is_the_same(
    rows: Path, make_byte_level: Any, templates: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, data = make_byte_level(templates.chatml), make_data()
    first = encode.encode(rows, tokenizer, data)
    monkeypatch.setattr(encoder.Encoder, "encode_chunk", lambda *args, **more: pytest.fail("tokenised again"))
    again = encode.encode(rows, tokenizer, data)
    assert list(again.examples) == list(first.examples) and len(again.examples) == len(ROWS)
    assert again.tally == first.tally
    assert again.stats == first.stats and again.lengths.tolist() == first.lengths.tolist()
    assert again.labelled.tolist() == first.labelled.tolist()
    assert again.examples.digests().tolist() == first.examples.digests().tolist()


def test_whatever_changes_a_token_is_another_file(
    rows: Path, make_byte_level: Any, templates: Any, make_data: Any, tmp_path: Path
) -> None:
    tokenizer = make_byte_level(templates.chatml)
    own = tmp_path / "own.jinja"
    own.write_text(templates.chatml)
    keys = [
        encode.key(rows, tokenizer, make_data()),
        encode.key(rows, tokenizer, make_data(mask="all")),
        encode.key(rows, tokenizer, make_data(max_length=17)),
        encode.key(rows, tokenizer, make_data(chat_template=str(own))),
        encode.key(rows, make_byte_level(templates.llama3), make_data()),
        encode.key(rows, make_byte_level(templates.chatml, special=["<new>"]), make_data()),
    ]
    own.write_text(templates.llama3)
    keys.append(encode.key(rows, tokenizer, make_data(chat_template=str(own))))
    assert encode.key(rows, tokenizer, make_data()) == keys[0]
    rows.write_text(rows.read_text().replace("what is 3", "what is 8"))
    keys.append(encode.key(rows, tokenizer, make_data()))
    assert None not in keys and len(set(keys)) == len(keys)


@pytest.mark.parametrize("harm", ["cut", "empty", "not arrow", "no tally"])
def test_a_damaged_file_is_not_used(
    harm: str, rows: Path, make_byte_level: Any, templates: Any, make_data: Any
) -> None:
    import pyarrow as pa

    tokenizer, data = make_byte_level(templates.chatml), make_data()
    first = encode.encode(rows, tokenizer, data)
    examples, schema = list(first.examples), first.examples.batches[0].schema
    (path,) = encode.folder().glob("*.arrow")
    whole = path.read_bytes()
    if harm == "no tally":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch([[]] * len(schema), schema=schema))
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "not arrow": b"x" * len(whole)}[harm])
    assert encode.load(path.stem) is None
    assert list(encode.encode(rows, tokenizer, data).examples) == examples
    assert encode.load(path.stem) is not None, "made again"


def test_a_cache_that_cannot_be_written_is_done_without(
    rows: Path, make_byte_level: Any, templates: Any, make_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file"))
    found = encode.encode(rows, make_byte_level(templates.chatml), make_data())
    assert len(found.examples) == len(ROWS)


def test_few_rows_are_not_kept_and_the_oldest_go_first(
    rows: Path, make_byte_level: Any, templates: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_byte_level(templates.chatml)

    def kept(**data: Any) -> list[str]:
        encode.encode(rows, tokenizer, make_data(**data))
        return [f.stem for f in encode.folder().glob("*.arrow")]

    (first,) = kept()
    size = next(encode.folder().glob("*.arrow")).stat().st_size
    monkeypatch.setattr(encode, "MAX_BYTES", size + size // 2)
    (second,) = kept(mask="all")
    assert first != second
    monkeypatch.setattr(encode, "MIN_ROWS", 1000)
    assert kept(max_length=99) == [second]

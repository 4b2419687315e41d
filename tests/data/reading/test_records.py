"""Every kind of file gives every record it holds, or says what is wrong with it and where."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halfbyte.data.reading import files, records
from halfbyte.data.reading.problems import BadRow
from halfbyte.data.reading.read import Reader
from halfbyte.errors import DataError
from tests.data.in_memory import read_rows

PAIRS = [{"prompt": f'q{i}\n"é, {i}', "completion": f"a{i}"} for i in range(5)]
LINES = "".join(json.dumps(p) + "\n" for p in PAIRS)


def make(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_text(rows: list[dict[str, str]], mark: str = ",") -> str:
    import io

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def seen(path: Path) -> list[tuple[int, Any]]:
    (source,) = files.find(path)
    made: list[tuple[int, Any]] = []
    for number, record in records.records(source):
        try:
            made.append((number, records.parse(record)))
        except BadRow as bad:
            made.append((number, str(bad)))
    return made


KINDS: dict[str, str | bytes] = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.json": json.dumps(PAIRS),
    "b.json": json.dumps(PAIRS, indent=2),
    "c.json": json.dumps({"version": "1", "data": PAIRS}),
    "d.json": json.dumps({"version": "1", "data": PAIRS}, indent=1),
    "e.json": LINES,
    "f.json.gz": gzip.compress(json.dumps(PAIRS).encode("utf-8-sig")),
    "a.csv": csv_text(PAIRS),
    "b.csv": csv_text(PAIRS, ";"),
    "a.tsv": csv_text(PAIRS, "\t"),
    "c.csv.gz": gzip.compress(csv_text(PAIRS).encode("utf-8-sig")),
    "without_an_ending": LINES,
}


@pytest.mark.parametrize("name", KINDS)
def test_the_same_rows_from_every_kind_of_file(tmp_path: Path, make_data: Any, name: str) -> None:
    rows = read_rows(make(tmp_path, name, KINDS[name]), make_data())
    assert [{"prompt": r.prompt, "completion": r.completion} for r in rows] == PAIRS


def test_parquet_gives_no_tool_the_fields_of_another(tmp_path: Path, make_data: Any) -> None:
    def tool(name: str, of: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {of: {"type": "string"}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    def call(name: str, of: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "arguments": {"where": {of: "x"}, "all": [None]}}}

    tools = [tool("weather", "city"), tool("price", "item")]
    talks = [
        [{"role": "system"}, {"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call(*names)]}]
        for names in (("weather", "city"), ("price", "item"))
    ]
    written = [{"messages": talk, "tools": tools} for talk in talks]
    pq.write_table(pa.Table.from_pylist(written), tmp_path / "rows.parquet")
    make(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in written))
    for name in ("rows.parquet", "rows.jsonl"):
        for row, names in zip(read_rows(tmp_path / name, make_data()), ("city", "item"), strict=True):
            assert row.tools == tuple(tools)
            (said,) = row.messages[2].more["tool_calls"]
            assert said["function"]["arguments"] == {"where": {names: "x"}, "all": [None]}


def test_parquet_with_nested_messages(tmp_path: Path, make_data: Any) -> None:
    talk = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": None}]
    pq.write_table(pa.table({"messages": [talk] * 3000, "id": list(range(3000))}), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet", make_data())
    assert len(rows) == 3000
    assert (rows[2999].where, rows[2999].messages[1].content) == ("rows.parquet row 3000", "a")
    with pytest.raises(DataError, match=r"x\.parquet is not Parquet that can be read"):
        read_rows(make(tmp_path, "x.parquet", "no"), make_data())
    renamed = (tmp_path / "rows.parquet").read_bytes().replace(b"messages", b"mess\xaeges")
    with pytest.raises(DataError, match=r"x\.parquet is not Parquet that can be read: 'utf-8' codec can't decode"):
        read_rows(make(tmp_path, "x.parquet", renamed), make_data())


def test_lines_and_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    assert [n for n, _ in seen(make(tmp_path, "a.jsonl", f"\n{LINES}"))] == [2, 3, 4, 5, 6]
    assert [n for n, _ in seen(make(tmp_path, "a.csv", csv_text(PAIRS)))] == [2, 4, 6, 8, 10]  # a line end in each
    assert [n for n, _ in seen(make(tmp_path, "a.json", json.dumps(PAIRS)))] == [1, 2, 3, 4, 5]


def test_globs_lists_and_each_file_once(tmp_path: Path, make_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        make(tmp_path, name, json.dumps({"prompt": name, "completion": "x"}))
    names = ("c.jsonl", "*.jsonl", "a.jsonl")
    assert [r.prompt for r in read_rows(names, make_data())] == ["c.jsonl", "a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match=r"^\*\.csv matches no file"):
        read_rows("*.csv", make_data())
    make(tmp_path, "[x].jsonl", LINES)
    assert len(read_rows("[x].jsonl", make_data())) == 5  # a file of that name wins over the pattern


def test_each_source_has_a_format_of_its_own(tmp_path: Path, make_data: Any) -> None:
    a = make(tmp_path, "a.jsonl", LINES)
    b = make(tmp_path, "b.json", json.dumps([{"instruction": "do", "output": "done"}]))
    reader = Reader(files.find((str(a), str(b))), make_data())
    assert [chunk.known for chunk in reader.chunks()] == [
        ("prompt_completion", ("prompt", "completion")),
        ("alpaca", ("instruction", "output")),
    ]
    reader = Reader(files.find((str(a), str(b))), make_data())
    assert [row.messages is None for row in reader] == [True] * 5 + [False] and reader.rows == 6


NO_NAME = "Expecting property name enclosed in double quotes"
DIGITS = (
    "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; use "
    "sys.set_int_max_str_digits() to increase the limit"
)
RETURN = "a carriage return alone ends no line; tr '\\r' '\\n' < FILE"
UNCLOSED = "not CSV: a quote that this row opens is never closed, so that it goes on to"
# what a file holds -> (number, record or what is said of it)
BAD: list[tuple[str, str | bytes, list[tuple[int, Any]]]] = [
    ("a.json", "[]", []),
    ("a.json", "[1, {}]", [(1, "an object is needed, got the number 1"), (2, {})]),
    ("a.json", "[{}, {", [(1, {}), (2, f"not JSON ({NO_NAME}), so the rest of the file cannot be read")]),
    ("a.json", "[{} {}]", [(1, {}), (2, "a comma or ] is needed, got '{'; the rest cannot be read")]),
    ("a.json", "[{}", [(1, {}), (2, "a comma or ] is needed, got the end of the file; the rest cannot be read")]),
    ("a.json", "[{}] {}", [(1, {}), (2, "'{' follows the end of the list, and cannot be read")]),
    ("a.json", b'[{}, {"a": "\xff"}]', [(1, "not UTF-8 (byte 0xff), so the rest cannot be read")]),
    ("a.json", "[" * 100_000, [(1, "nested too deeply, so the rest of the file cannot be read")]),
    ("a.json", "\n { \n", [(2, f"not JSON ({NO_NAME} at character 2): {{")]),
    ("a.csv", "a,b\n1\n1,2,3\n\n4,5\n", [(2, "1 field, and the header has 2"), (3, "3 fields, and the header has 2"),
                                         (5, {"a": "4", "b": "5"})]),
    ("a.csv", b"a,b\n1,\xff\n3,4\n", [(2, "b: not UTF-8 (byte 0xff)"), (3, {"a": "3", "b": "4"})]),
    ("a.csv", 'a,b\n"1"x,2\n3,4\n', [(2, "not CSV: ',' expected after '\"'"), (3, {"a": "3", "b": "4"})]),
    ("a.csv", 'a,b\n1,"2\n3,4\n', [(2, f"{UNCLOSED} line 3")]),
    ("a.csv", 'a,b\n3,"4\n5\n"\n6,"7\n8,9\n', [(2, {"a": "3", "b": "4\n5\n"}), (5, f"{UNCLOSED} line 6")]),
    ("a.txt", b"\xef\xbb\xbfOnce upon\r\na time\n\n{}\n", [(1, {"text": "Once upon\na time\n\n{}\n"})]),
    ("a.txt", b"a\xff", [(1, "not UTF-8 (byte 0xff at 2)")]),
    ("a.txt", " \n", []),
    ("a.jsonl", '{"a": ' + "1" * 5000 + "}", [(1, f"not JSON that can be read: {DIGITS}")]),
    ("a.jsonl", '{"a": 1}\r{"a": 2}', [(1, f'not JSON ({RETURN}): {{"a": 1}}\r{{"a": 2}}')]),
    ("a.jsonl", b'\x00{"a": 1}', [(1, 'not JSON (Expecting value at character 1): \x00{"a": 1}')]),
]  # fmt: skip


def test_json_lines_under_the_name_of_a_text_are_not_trained_as_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.txt holds JSON lines.*\n  fix: name it a.jsonl"):
        seen(make(tmp_path, "a.txt", '{"prompt": "a", "completion": "b"}\n'))


def test_a_text_is_named_after_its_file(tmp_path: Path, make_data: Any) -> None:
    (tmp_path / "a.txt").write_text("Once"), (tmp_path / "b.txt").write_text("upon")
    found = list(Reader(files.find(str(tmp_path / "*.txt")), make_data()))
    assert [(row.where, row.text) for row in found] == [("a.txt", "Once"), ("b.txt", "upon")]


@pytest.mark.parametrize(("name", "content", "expected"), BAD)
def test_what_is_wrong_and_where(tmp_path: Path, name: str, content: str | bytes, expected: list[Any]) -> None:
    assert seen(make(tmp_path, name, content)) == expected


def test_a_gzip_file_that_is_cut_short(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"a": i * 7919 % 10007}) + "\n" for i in range(50_000)).encode())
    found = seen(make(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2]))
    assert len(found) > 1000
    assert [r for _, r in found if isinstance(r, str)] == [found[-1][1]]
    assert found[-1][1].startswith("the file is damaged or cut short here: ")
    with pytest.raises(DataError, match="is not gzip, as its ending says"):
        seen(make(tmp_path, "b.jsonl.gz", "{}\n"))
    with pytest.raises(DataError, match=r"is gzip\.\n  fix: name it c\.jsonl\.gz"):
        seen(make(tmp_path, "c.jsonl", whole))


OTHERS: dict[str, tuple[bytes, str]] = {
    "a.arrow": (b"ARROW1\0\0", "is Arrow; read are .*fix: python -c .*read_feather.* TMP/a.arrow TMP/a.parquet"),
    "data-00000.arrow": (b"\xff\xff\xff\xff\x10\0\0\0", "is Arrow; read are .*fix: python -c .*Dataset.from_file"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\0", "is compressed by zstd; .*fix: zstd -d TMP/a.jsonl.zst -o TMP/a.jsonl$"),
    "a.csv.bz2": (b"BZh91AY", "is compressed by bzip2; .*fix: bunzip2 -k TMP/a.csv.bz2$"),
    "a.csv": (b"BZh91AY", "is compressed by bzip2; "),
    "a.jsonl.xz": (b"\xfd7zXZ\0\0", "is compressed by xz; .*fix: unxz -k TMP/a.jsonl.xz$"),
    "a.xlsx": (b"PK\3\4\x14", "is a zip archive, as Excel's sheets are; .*fix: unzip TMP/a.xlsx, or save the sheet as"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_a_kind_that_is_not_read(tmp_path: Path, name: str) -> None:
    begins, said = OTHERS[name]
    with pytest.raises(DataError) as error:
        seen(make(tmp_path, name, begins * 9))
    assert re.search("(?s)" + said, str(error.value).replace(str(tmp_path), "TMP")), error.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_is_given_twice_is_told(tmp_path: Path, name: str) -> None:
    whole, twice, deep = '{"a": 1, "b": {"a": 2}}', '{"a": 1, "b": 2, "a": 3}', '{"b": [{"c": 1, "c": 1}]}'
    lines = f"{whole}\n{twice}\n{deep}\n{whole}\n"
    path = make(tmp_path, name, lines if name == "a.jsonl" else f"[{','.join(lines.splitlines())}]")
    told = ["the key 'a' is given twice", "the key 'c' is given twice"]
    assert [record for _, record in seen(path)] == [json.loads(whole), *told, json.loads(whole)]


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 3}', '{"rows": [{"a": 1}, {"b": 2, "a": 1, "a": 2}]}'])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_key_that_is_given_twice_in_an_object_of_several_lines(tmp_path: Path, text: str, mark: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(mark + re.sub(r"([{,\[])", r"\1\n  ", text).encode())
    assert seen(path) == [(1, "the key 'a' is given twice")]


@pytest.mark.parametrize("mark", ["a,b\n", "a,b", "\n", ""])
def test_a_csv_without_rows(tmp_path: Path, make_data: Any, mark: str) -> None:
    path = make(tmp_path, "a.csv", mark)
    with pytest.raises(DataError, match=r"has no rows\.\n  fix: write the columns' names in the first line"):
        read_rows(path, make_data())


def test_a_csv_with_a_column_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: the column 'a' is there twice\.\n  fix: rename one of them"):
        seen(make(tmp_path, "a.csv", "a,a\n1,2\n"))


def test_rows_of_ten_megabytes(tmp_path: Path, make_data: Any) -> None:
    long = json.dumps({"prompt": "a", "completion": "b" * 10_000_000})
    rows = read_rows(make(tmp_path, "a.jsonl", f"{long}\n{long}"), make_data())
    assert [len(r.completion) for r in rows] == [10_000_000] * 2
    listed = read_rows(make(tmp_path, "a.json", f"[{long},{long}]"), make_data())
    assert [r.completion for r in listed] == [r.completion for r in rows]


def test_a_line_that_is_no_row_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 100)
    path = make(tmp_path, "a.jsonl", '{"a": 1}\n' + "x" * 1000 + '\n{"a": 2}\n' + "y" * 150)
    assert seen(path) == [
        (1, {"a": 1}), (2, "longer than 100 bytes"), (3, {"a": 2}), (4, "longer than 100 bytes"),
    ]  # fmt: skip


def test_a_hub_dataset_is_named_by_the_arguments_of_load_dataset(tmp_path: Path, make_data: Any) -> None:
    make(tmp_path, "train.jsonl", LINES)
    rows = read_rows(f"hub:{tmp_path}?split=train", make_data())
    assert [r.completion for r in rows] == ["a0", "a1", "a2", "a3", "a4"]
    assert rows[4].where == f"{tmp_path}/train row 5"
    with pytest.raises(DataError, match=r"which split\?\n  fix: as in hub:openai/gsm8k\?name=main&split=train"):
        files.find("hub:openai/gsm8k")
    with pytest.raises(DataError, match=r"'part' is not an argument; allowed after the \?: name, split, revision"):
        files.find("hub:openai/gsm8k?part=train")
    with pytest.raises(DataError, match=r"the dataset .*nowhere could not be loaded"):
        read_rows(f"hub:{tmp_path}/nowhere?split=train", make_data())

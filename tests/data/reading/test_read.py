"""Every row is read or is named in an error: file, line, field, and what was found."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.reading.formats import ChatMessage, detect_format
from halfbyte.data.reading.read import check_fields, unread
from halfbyte.errors import DataError, RecipeError
from halfbyte.recipe.data import DataEntry, Fields
from tests.data.in_memory import read_rows

GOOD = '{"prompt": "a", "completion": "b"}'


def write(folder: Path, content: str | bytes, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def chat(*messages: tuple[str, str], **more: Any) -> str:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages], **more})


def test_prompt_completion(tmp_path: Path, make_data: Any) -> None:
    path = write(tmp_path, '{"question": "2+2?", "answer": "4", "id": 7}\n{"question": "é\\u2028", "answer": "ß"}')
    rows = read_rows(path, make_data(fields={"prompt": "question", "completion": "answer"}))
    assert [(r.where, r.prompt, r.completion, r.messages) for r in rows] == [
        ("train.jsonl:1", "2+2?", "4", None),
        ("train.jsonl:2", "é\u2028", "ß", None),
    ]


def test_columns_that_nothing_is_read_from_are_told(tmp_path: Path, make_data: Any) -> None:
    labelled = write(tmp_path, "text,source\ngood stuff,1\n", "reviews.csv")
    pairs = write(tmp_path, '{"prompt": "a", "completion": "b", "tools": null}\n', "pairs.jsonl")
    assert unread([str(labelled), str(pairs)], make_data()) == ["reviews.csv is read as text; not read of it: source"]
    indexed = write(tmp_path, ",text\n0,good stuff\n", "pandas.csv")
    said = ["pandas.csv is read as text; not read of it: a column without a name"]
    assert unread(str(indexed), make_data()) == said
    asked = make_data(fields={"prompt": "text", "completion": "source"})
    assert unread(str(labelled), asked) == []


def test_what_is_wrong_with_many_rows_alike_is_said_once(tmp_path: Path, make_data: Any) -> None:
    rows = ['{"prompt": "a"}'] * 6 + ['{"prompt": "a", "completion": ""}'] * 3
    path = write(tmp_path, "\n".join([GOOD, *rows]))
    with pytest.raises(DataError) as e:
        read_rows(path, make_data(fields={"prompt": "prompt", "completion": "completion"}))
    head, alike, *each = str(e.value).splitlines()
    assert head == "9 of 10 rows cannot be used"
    assert alike == (f"  - {path}:2, {path}:3, {path}:4 and 3 more: completion: missing; the row has 'prompt'")
    assert each == [f"  - {path}:{n}: completion: empty" for n in (8, 9, 10)]


def test_messages(tmp_path: Path, make_data: Any) -> None:
    messages = [
        {"role": "system", "content": "s", "name": None},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "train": False},
        {"role": "tool", "content": "t", "train": False},
        {"role": "assistant", "content": "b", "train": True},
    ]
    (row,) = read_rows(write(tmp_path, json.dumps({"messages": messages})), make_data())
    assert row.messages == (
        ChatMessage("system", "s"),
        ChatMessage("user", "u"),
        ChatMessage("assistant", "a", train=False, weight=0.0),
        ChatMessage("tool", "t"),
        ChatMessage("assistant", "b"),
    )


@pytest.mark.parametrize(
    "content",
    [
        f"{GOOD}\n{GOOD}\n",
        f"{GOOD}\n{GOOD}",
        f"{GOOD}\r\n{GOOD}\r\n",
        b"\xef\xbb\xbf" + f"{GOOD}\n{GOOD}\n".encode(),
        f"{GOOD}\n\n  \t\r\n{GOOD}\n\n",
    ],
)
def test_ends_marks_and_blank_lines(tmp_path: Path, make_data: Any, content: str | bytes) -> None:
    assert [(r.prompt, r.completion) for r in read_rows(write(tmp_path, content), make_data())] == [("a", "b")] * 2


def test_line_numbers_count_blank_lines_and_only_real_line_ends(tmp_path: Path, make_data: Any) -> None:
    odd = '{"prompt": "a\u2028\u0085", "completion": "b"}'
    rows = read_rows(write(tmp_path, f"\n{odd}\n\n{GOOD}"), make_data())
    assert [r.where for r in rows] == ["train.jsonl:2", "train.jsonl:4"]


@pytest.mark.parametrize(
    ("record", "asked", "expected"),
    [
        ({"messages": []}, "auto", "messages"),
        ({"prompt": 1, "completion": 2}, "auto", "prompt_completion"),
        ({"messages": [], "prompt": 1, "completion": 1}, "auto", "messages"),
        ({}, "messages", "messages"),
    ],
)
def test_format(make_data: Any, record: dict[str, Any], asked: str, expected: str) -> None:
    assert detect_format(record, make_data(format=asked)) == expected


def test_a_format_that_cannot_be_told(tmp_path: Path, make_data: Any) -> None:
    path = write(tmp_path, '{"question": "a", "answer": "b"}')
    with pytest.raises(DataError) as error:
        read_rows(path, make_data())
    assert str(error.value) == (
        f"{path}:1: cannot tell the format. Needed: the key 'messages' or 'conversations', or both 'prompt' and "
        "'completion', or 'instruction' and 'output', or 'text'; got 'question', 'answer'.\n"
        "  fix: name the columns, as in --set data.fields.prompt=question --set data.fields.completion=answer"
    )


BAD_ROWS = [
    ("{", "not JSON (Expecting property name enclosed in double quotes at character 2): {"),
    (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8 (byte 0xff at 13)"),
    ("7", "an object is needed, got the number 7"),
    ("null", "an object is needed, got null"),
    ('"x"', "an object is needed, got the string 'x'"),
    ("[1]", "an object is needed, got a list"),
    ('{"prompt": "a"}', "completion: missing; the row has 'prompt'"),
    (
        '{"Prompts": "a", "completion": "b"}',
        "prompt: missing; the row has 'Prompts', 'completion'; did you mean 'Prompts'?",
    ),
    ("{}", "prompt: missing; the row has no keys"),
    ('{"prompt": 3, "completion": "b"}', "prompt: a string is needed, got the number 3"),
    (
        '{"prompt": "a", "completion": ["b"]}',
        "completion[0]: an object with role and content is needed, got the string 'b'",
    ),
    ('{"prompt": "a", "completion": null}', "completion: a string is needed, got null"),
    ('{"prompt": true, "completion": "b"}', "prompt: a string is needed, got true or false"),
    ('{"prompt": "", "completion": "b"}', "prompt: empty"),
    ('{"prompt": "a", "completion": " \\n"}', "completion: only white space"),
    ('{"prompt": "a\\ud800", "completion": "b"}', "prompt: half a surrogate pair ('\\ud800') is not text"),
]


@pytest.mark.parametrize(("bad", "text"), BAD_ROWS)
def test_a_bad_row(tmp_path: Path, make_data: Any, bad: str | bytes, text: str) -> None:
    raw = bad if isinstance(bad, bytes) else bad.encode()
    path = write(tmp_path, GOOD.encode() + b"\n" + raw + b"\n" + GOOD.encode())
    with pytest.raises(DataError) as error:
        read_rows(path, make_data())
    assert str(error.value) == f"1 of 3 rows cannot be used\n  - {path}:2: {text}"


BAD_MESSAGES = [
    ('{"message": []}', "messages: missing; the row has 'message'; did you mean 'message'?"),
    ('{"messages": "hi"}', "messages: a list of messages is needed, got the string 'hi'"),
    ('{"messages": []}', "messages: no message has the role assistant, so there is nothing to learn from"),
    (chat(("user", "u")), "messages: no message has the role assistant, so there is nothing to learn from"),
    (
        chat(("assistant", "a"), ("user", "u")),
        "messages[1].role: the last message must be of the assistant, got 'user'",
    ),
    (
        chat(("Assistent", "a")),
        (
            "messages[0].role: one of system, developer, user, assistant, tool is needed, got 'Assistent'; "
            "did you mean 'assistant'?"
        ),
    ),
    (chat(("user", "u"), ("assistant", "")), "messages[1].content: empty"),
    ('{"messages": ["hi"]}', "messages[0]: an object with role and content is needed, got the string 'hi'"),
    ('{"messages": [{"content": "a"}]}', "messages[0].role: missing; the row has 'content'"),
    (
        '{"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}',
        "messages[0].content[0]: an object with type text and a text is needed, got an object",
    ),
    (
        '{"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}',
        "messages[0].tool_calls[0]: an object is needed, got the number 1",
    ),
    (
        '{"messages": [{"role": "assistant", "content": "a", "train": "no"}]}',
        "messages[0].train: true or false is needed, got the string 'no'",
    ),
    (
        '{"messages": [{"role": "user", "content": "a", "weight": "b"}, {"role": "assistant", "content": "a"}]}',
        "messages[0].weight: a number from 0 on is needed, got the string 'b'",
    ),
]


@pytest.mark.parametrize(("bad", "text"), BAD_MESSAGES)
def test_a_bad_conversation(tmp_path: Path, make_data: Any, bad: str, text: str) -> None:
    path = write(tmp_path, bad)
    with pytest.raises(DataError) as error:
        read_rows(path, make_data(format="messages"))
    assert str(error.value) == f"1 of 1 rows cannot be used\n  - {path}:1: {text}"


def test_all_bad_rows_are_counted_and_twenty_are_shown(tmp_path: Path, make_data: Any) -> None:
    path = write(tmp_path, "\n".join([GOOD] + [f'{{"prompt": "a", "{n}": 1}}' for n in range(1023)]))
    with pytest.raises(DataError) as error:
        read_rows(path, make_data())
    lines = str(error.value).splitlines()
    assert lines[0] == "1,023 of 1,024 rows cannot be used"
    assert len(lines) == 22
    assert lines[20].startswith(f"  - {path}:21: completion: missing")
    assert lines[21] == "  ... and 1,003 more"


def test_a_bad_first_row_does_not_hide_the_format(tmp_path: Path, make_data: Any) -> None:
    path = write(tmp_path, f"oops\n{GOOD}\n" + '{"prompt": "a"}')
    with pytest.raises(DataError) as error:
        read_rows(path, make_data())
    assert "2 of 3 rows" in str(error.value)
    assert f"{path}:1: not JSON" in str(error.value)
    assert f"{path}:3: completion: missing" in str(error.value)


def test_deep_nesting_is_no_crash(tmp_path: Path, make_data: Any) -> None:
    path = write(tmp_path, GOOD + '\n{"prompt": ' + "[" * 200_000)
    with pytest.raises(DataError, match="2: not JSON"):
        read_rows(path, make_data())


@pytest.mark.parametrize("content", ["", "\n \n", b"\xef\xbb\xbf"])
def test_no_rows(tmp_path: Path, make_data: Any, content: str | bytes) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as error:
        read_rows(path, make_data())
    assert str(error.value).startswith(f"{path} has no rows.\n  fix: write one JSON object a line")


def test_a_missing_file_names_a_near_one(tmp_path: Path, make_data: Any) -> None:
    write(tmp_path, GOOD, "train.jsonl")
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / "trian.jsonl", make_data())
    expected = f"{tmp_path / 'trian.jsonl'}: no such file.\n  fix: did you mean {tmp_path / 'train.jsonl'}?"
    assert str(error.value) == expected
    write(tmp_path, "", "trian.py")
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / "trian.jsonl", make_data())
    assert str(error.value) == expected, "a file of another kind is not meant"
    for unlike in (tmp_path / "held.jsonl", tmp_path / "nowhere" / "x.jsonl"):
        with pytest.raises(DataError) as error:
            read_rows(unlike, make_data())
        assert str(error.value) == f"{unlike}: no such file.\n  fix: check the path"


def test_a_link_to_nothing_names_what_is_not_there(tmp_path: Path, make_data: Any) -> None:
    (tmp_path / "rows.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl is a link to gone\.jsonl, which is not there\."):
        read_rows(tmp_path / "rows.jsonl", make_data())


@pytest.mark.parametrize("split", ["", "train"])
def test_a_folder_that_datasets_has_saved(split: str, tmp_path: Path, make_data: Any) -> None:
    folder = tmp_path / "saved" / split
    folder.mkdir(parents=True)
    for name in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"):
        (folder / name).write_text("{}")
    with pytest.raises(DataError, match=r"saved is a folder of datasets' save_to_disk, and its Arrow files ") as error:
        read_rows(tmp_path / "saved", make_data())
    assert str(error.value).endswith(f"{folder} saved.parquet") and "Dataset.load_from_disk" in str(error.value)


def test_a_folder(tmp_path: Path, make_data: Any) -> None:
    write(tmp_path, GOOD, "rows.jsonl")
    with pytest.raises(DataError) as error:
        read_rows(tmp_path, make_data())
    expected = f"{tmp_path} is a folder; it holds 1 .jsonl.\n  fix: name its files: {tmp_path / 'rows.jsonl'}"
    assert str(error.value) == expected
    (tmp_path / "deep").mkdir()
    for name in ("a.md", "deep/b.md", "c.md.gz", "deep/picture.png", "README"):
        write(tmp_path, "text", name)
    with pytest.raises(DataError) as error:
        read_rows(tmp_path, make_data())
    assert error.value.message.startswith(f"{tmp_path} is a folder; it holds 2 .md, 1 ")
    assert error.value.message.endswith(" and others.")
    names = [str(tmp_path / name) for name in ("**/*.md", "*.jsonl", "*.md.gz")]
    assert error.value.fix == f"name its files: [{', '.join(names)}]"
    assert [row.text for row in read_rows(names[0], make_data())] == ["text", "text"]
    (tmp_path / "deep" / "b.md").unlink()
    with pytest.raises(DataError, match=r"is a folder; it holds 1 \.png\.$"):
        read_rows(tmp_path / "deep", make_data())


def test_one_json_list_under_the_name_of_json_lines(tmp_path: Path, make_data: Any) -> None:
    path = write(tmp_path, f"[\n{GOOD},\n{GOOD}\n]")
    with pytest.raises(DataError) as error:
        read_rows(path, make_data())
    assert str(error.value) == (
        f"{path}:1 opens a JSON list; one JSON object a line is needed.\n"
        f"  fix: name it .json, or: jq -c '.[]' {path} > train.jsonl"
    )


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.json", "train.txt", "train.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16LE", "UTF-16BE"])
def test_utf16(tmp_path: Path, make_data: Any, name: str, encoding: str) -> None:
    """With a byte order mark and without one; what the command writes can be read."""
    content = "prompt,completion\nä,日本\n" if name == "train.csv" else f"{GOOD}\n"
    raw = content.encode(encoding)
    path = write(tmp_path, gzip.compress(raw) if name.endswith(".gz") else raw, name)
    with pytest.raises(DataError, match="is UTF-16; UTF-8 is needed") as error:
        read_rows(path, make_data())
    assert error.value.fix is not None
    if shutil.which("iconv") is None:
        pytest.skip("no iconv")
    subprocess.run(error.value.fix, shell=True, check=True)
    assert (tmp_path / f"train.utf8.{name.split('.')[1]}").read_text(encoding="utf-8") == content


def test_fields_that_name_no_column_of_any_file_are_refused(tmp_path: Path, make_data: Any) -> None:
    """Though the format is told from other columns; a column that one of the files has is not missed in the others."""
    alpaca = write(tmp_path, "instruction,input,output\na,b,c\n", "a.csv")
    asked = make_data(fields={"prompt": "instrucion", "completion": "outpt"})
    with pytest.raises(RecipeError) as error:
        check_fields(str(alpaca), asked)
    assert str(error.value) == (
        "2 problems\n"
        "  - data.fields.prompt: the rows have no column 'instrucion', but 'instruction', 'input', 'output'; did you "
        "mean 'instruction'?\n"
        "  - data.fields.completion: the rows have no column 'outpt', but 'instruction', 'input', 'output'; did you "
        "mean 'output'?"
    )
    typos = write(tmp_path, '{"instrucion": "a", "outpt": "b"}', "b.jsonl")
    check_fields([str(alpaca), str(typos)], asked)
    check_fields(str(alpaca), make_data(fields={"system": "persona", "tools": "functions"}))
    entry = DataEntry(path=str(alpaca), fields=Fields(text="story"))
    with pytest.raises(RecipeError, match=r"data\.fields\.text: a\.csv has no column 'story', but 'instruction'"):
        check_fields([entry], make_data())


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.json", "train.txt", "train.jsonl.gz"])
@pytest.mark.parametrize(("encoding", "told"), [("latin-1", "Latin-1"), ("cp1252", "Windows-1252")])
def test_one_byte_a_character(tmp_path: Path, make_data: Any, name: str, encoding: str, told: str) -> None:
    """Help as for UTF-16; what iconv then writes can be read."""
    quoted = "“Où?” – à côté" if encoding == "cp1252" else "Où? à côté"
    pair = f'{{"prompt": "{quoted}", "completion": "café"}}'
    kind = name.split(".")[1]
    contents = {"csv": f"prompt,completion\n{quoted},café\n", "json": f"[{pair}]", "txt": f"{quoted} café"}
    content = contents.get(kind, pair + "\n")
    raw = content.encode(encoding)
    path = write(tmp_path, gzip.compress(raw) if name.endswith(".gz") else raw, name)
    with pytest.raises(DataError, match=rf"train\S+ looks like {told} \(line \d: .*Où") as error:
        read_rows(path, make_data())
    command = f"iconv -f {'ISO-8859-1' if told == 'Latin-1' else told} -t UTF-8"
    command = f"gunzip -c {path} | {command}" if name.endswith(".gz") else f"{command} {path}"
    assert error.value.fix == f"{command} > {tmp_path / f'train.utf8.{kind}'}"
    write(tmp_path, gzip.compress(content.encode()) if name.endswith(".gz") else content, name)
    assert len(read_rows(path, make_data())) == 1


def test_a_damaged_byte_is_one_bad_row(tmp_path: Path, make_data: Any) -> None:
    """UTF-8 elsewhere, or no letter: the row is named, and the others are read."""
    several = f'{GOOD}\n{{"prompt": "é"}}\n'.encode()
    for damaged in (several + b'{"prompt": "caf\xe9"}', b'{"prompt": "\xff"}'):
        with pytest.raises(DataError, match=r"not UTF-8 \(byte 0x"):
            read_rows(write(tmp_path, damaged), make_data())

"""The file of predictions: columns and types of CSV and Parquet, half characters, failures that leave nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from halfbyte.errors import DataError
from halfbyte.inference import prediction_file

VECTOR = [n / 7 for n in range(1100)]  # more than numpy prints


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """A whole partial file, and what is made of it; chunks of two rows."""
    partial, out = folder / f"out.{kind}.partial", folder / f"out.{kind}"
    partial.write_bytes(b'{"adapter": "a"}\n' + b"".join(map(prediction_file.line, rows)))
    prediction_file.finish(partial, out)
    assert [path.name for path in folder.iterdir()] == [out.name]
    return out


@pytest.fixture(autouse=True)
def chunks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_file, "CHUNK_ROWS", 2)


ROWS: list[dict[str, Any]] = [
    {"text": 'say "no"', "when": "2024-01-01T10:00:00+02:00", "day": "2024-01-01", "n": 1, "id": "007", "v": VECTOR},
    {"text": "a,b\nc\rd", "when": "2024-01-02", "day": None, "n": 2.5, "mixed": 1, "e": {}, "v": [1, 2.0]},
    {"text": "null", "mixed": "one", "late": {"a": [True, None]}, "e": {"x": 1}},
    {"text": "", "mixed": None, "late": {"b": "ä"}, "prediction": ["x", "y"], "probabilities": {"x": 0.75, "y": 1e-9}},
    {"text": "  ", "big": 2**70, "error": "a.csv:6: text: only white space"},
]
COLUMNS = ["text", "when", "day", "n", "id", "v", "mixed", "e", "late", "prediction", "p.x", "p.y", "big", "error"]


def flat(row: dict[str, Any]) -> dict[str, Any]:
    every = {f"p.{name}": value for name, value in row.get("probabilities", {}).items()}
    return {name: {**row, **every}.get(name) for name in COLUMNS}


def in_csv(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def test_csv_has_texts_as_they_are_and_all_else_as_json(tmp_path: Path) -> None:
    with written(tmp_path, "csv", ROWS).open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == COLUMNS
    assert lines[1:] == [[in_csv(value) for value in flat(row).values()] for row in ROWS]


def test_parquet_has_a_type_for_each_column(tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(written(tmp_path, "parquet", ROWS))
    assert table.column_names == COLUMNS
    texts = {"mixed", "big", "e"}
    kinds = {name: str(table.schema.field(name).type) for name in COLUMNS}
    assert {kinds[name] for name in ("text", "when", "day", "id", "error", *texts)} == {"string"}
    assert [kinds[n] for n in ("n", "p.x", "late")] == ["double"] * 2 + ["struct<a: list<element: bool>, b: string>"]
    for row, line in zip(map(flat, ROWS), table.to_pylist(), strict=True):
        for name, value in row.items():
            if name == "late" and value is not None:
                value = {"a": None, "b": None, **value}
            text = name in texts and value is not None and not isinstance(value, str)
            assert line[name] == (json.dumps(value) if text else value), name


@pytest.mark.parametrize("rows", [[1, 2, 0.5, 2**53 + 1], [2**53 + 1, 2, 0.5], [1, 2, 2**63], [True, 1], [[1], ["a"]]])
def test_no_number_is_rounded_by_a_column_of_parquet(rows: list[Any], tmp_path: Path) -> None:
    out = written(tmp_path, "parquet", [{"x": value} for value in rows])
    assert pyarrow.parquet.read_table(out)["x"].to_pylist() == [json.dumps(value) for value in rows]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_half_a_character_is_its_escape(kind: str, tmp_path: Path) -> None:
    rows = [{"text": "a \ud800 b", "k\udfff": ["\udc00", "😀", "\\ud800"]}, {"text": "ä"}]
    out = written(tmp_path, kind, rows)
    if kind == "jsonl":
        assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == rows
        return
    lines = list(csv.DictReader(out.open(encoding="utf-8"))) if kind == "csv" else (
        pyarrow.parquet.read_table(out).to_pylist()
    )  # fmt: skip
    assert [line["text"] for line in lines] == [r"a \ud800 b", "ä"]
    second = lines[0][r"k\udfff"]
    assert (json.loads(second) if kind == "csv" else second) == [r"\udc00", "😀", r"\ud800"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_failure_leaves_the_partial_file_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prediction_file.files, "put", full)
    (tmp_path / f".out.{kind}.999999999").touch()  # of a process that was killed
    with pytest.raises(OSError, match="No space"):
        written(tmp_path, kind, ROWS)
    assert [path.name for path in tmp_path.iterdir()] == [f"out.{kind}.partial"]


def test_columns_that_are_called_as_answers_are() -> None:
    row = {name: n for n, name in enumerate(("text", "error", "p.a", "input.error", "p", "vectors", "prediction"))}
    assert prediction_file.of_input(row) == {
        "text": 0, "input.error": 1, "input.p.a": 2, "input.input.error": 3, "p": 4, "vectors": 5, "input.prediction": 6
    }  # fmt: skip


def test_what_is_refused_before_a_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mails = tmp_path / "mails"
    mails.mkdir()
    for name in ("a", "b"):
        (mails / f"{name}.txt").write_text("red cup")
    (tmp_path / "latin.csv").write_bytes("text\nÜber Käse\n".encode("latin-1"))
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "rows.csv").write_text("text\nred\n")
    for suffix in prediction_file.SUFFIXES:
        with pytest.raises(DataError, match=r"none.jsonl has no rows\."):
            prediction_file.check(tmp_path / "none.jsonl", tmp_path / f"out{suffix}")
    out = tmp_path / "out.csv"
    with pytest.raises(DataError, match="looks like Latin-1"):
        prediction_file.check(tmp_path / "latin.csv", out)
    with pytest.raises(DataError, match=r"fix: halfbyte predict RUN '.*/mails/\*\.txt'"):
        prediction_file.check(mails, out)
    with pytest.raises(DataError, match=r"there is no folder .*/nodir") as missing:
        prediction_file.check(tmp_path / "rows.csv", tmp_path / "nodir" / "x.csv")
    assert missing.value.fix == f"mkdir -p {tmp_path / 'nodir'}"
    monkeypatch.setattr(prediction_file.files, "why_unwritable", lambda folder: f"{folder}: Read-only file system")
    with pytest.raises(DataError, match=r"out.csv cannot be written: .*Read-only"):
        prediction_file.check(tmp_path / "rows.csv", out)

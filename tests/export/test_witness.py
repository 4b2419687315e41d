"""What a run is asked on, where it names no rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.errors import DataError
from halfbyte.export import witness
from halfbyte.inference import load, target
from tests import tiny_run
from tests.export import runs


@pytest.mark.parametrize(("context", "at_least"), [(48, 48), (4096, 49)])
def test_an_adapter_alone_is_asked_on_a_text_of_ours_that_its_model_reads(
    context: int, at_least: int, tmp_path: Path
) -> None:
    runs.make(tmp_path, "plain")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": context}))
    opened = load.open_target(target.find(tmp_path / "adapter"))
    (row,), what = witness.rows_of(opened, None, 4)
    assert what == "texts of the base's kind"
    assert at_least <= len(row.input_ids) <= context


def test_rows_are_called_what_they_are(tmp_path: Path) -> None:
    runs.make(tmp_path, "plain")
    tiny_run.rows(tmp_path / "other.jsonl", 3)
    tiny_run.rows(tmp_path / "eval.jsonl", 2)
    names = {"training rows": (f"data.train={tmp_path / 'train.jsonl'}",)}
    names["held-out rows"] = (*names["training rows"], f"data.eval={tmp_path / 'eval.jsonl'}")
    for what, overrides in names.items():
        opened = load.open_target(target.find(tmp_path / "adapter", overrides))
        rows, told = witness.rows_of(opened, None, 64)
        assert (told, len(rows)) == (what, 2 if what == "held-out rows" else 16)
    rows, told = witness.rows_of(opened, tmp_path / "other.jsonl", 64)
    assert (told, len(rows)) == ("rows of other.jsonl", 3)
    with pytest.raises(DataError, match="nowhere"):
        witness.rows_of(opened, tmp_path / "nowhere.jsonl", 64)


def test_rows_prompts_and_answers_stay_within_a_window(tmp_path: Path) -> None:
    runs.make(tmp_path, "plain")
    data = tiny_run.rows(tmp_path / "rows.jsonl", 6)
    for name, window in (("whole", None), ("cut", 12)):
        (tmp_path / name).mkdir()
        asked = witness.RunQuestions(str(tmp_path / "adapter"), str(tmp_path / name), data=str(data), window=window)
        witness.write(asked)
    whole, cut = (json.loads((tmp_path / name / "witness.json").read_text()) for name in ("whole", "cut"))
    assert min(len(row["ids"]) for row in whole["rows"]) > 12
    assert [row["ids"] for row in cut["rows"]] == [row["ids"][-12:] for row in whole["rows"]]
    for row, wide in zip(cut["rows"], whole["rows"], strict=True):
        left = len(wide["ids"]) - 12
        assert row["at"] == [i - left for i in wide["at"] if i >= left] and row["at"]
    assert cut["prompts"] == [ids[-6:] for ids in whole["prompts"]] and cut["new_tokens"] == [6] * 6

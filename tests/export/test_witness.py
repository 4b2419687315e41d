"""What a run is asked on, where it names no rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    (row,) = witness.rows_of(opened, None, 4)
    assert at_least <= len(row.input_ids) <= context


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

"""The gates of rows that say which answer is better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.training.prepare import look
from tests import pairs, tiny_run


def gates(folder: Path, rows: list[dict[str, Any]], method: str = "dpo", **values: Any) -> dict[str, tuple[str, str]]:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = look(tiny_run.recipe(folder, train__method=method, **values).recipe).findings
    return {finding.gate: (finding.level, finding.found) for finding in found}


def row(i: int, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": f"a cup {pairs.WORDS[i]}", "chosen": chosen, "rejected": rejected}


def test_same_answers_length_and_prompts(tmp_path: Path) -> None:
    long = [row(i, "red green blue", "red") for i in range(9)]
    same = [row(9, "red", "red"), row(10, "red", "green blue")]
    (tmp_path / "eval.jsonl").write_text(
        json.dumps(row(3, "tree", "road")) + "\n" + json.dumps(row(11, "a", "b")) + "\n"
    )
    seen = gates(tmp_path, [*long, *same], data__eval=tmp_path / "eval.jsonl")
    assert seen["same answers"] == ("warning", "1 of 11 pairs have the same answer twice (train.jsonl:10)")
    level, text = seen["length bias"]
    assert level == "warning" and "longer one in 90%, so a rule of length alone is right in 90%" in text
    assert (
        seen["prompts"][0] == "warning"
        and "1 of 2 held-out rows have one that is trained on (eval.jsonl:1)" in seen["prompts"][1]
    )
    even = [row(i, *(("red green", "red") if i % 2 else ("red", "red green"))) for i in range(10)]
    assert {level for level, _ in gates(tmp_path / "even", even).values()} == {"ok"}


def test_verdicts_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"a {pairs.WORDS[i]}", "completion": "red", "label": i < 1} for i in range(10)]
    assert gates(tmp_path, rows, "kto")["verdicts"] == ("warning", "10% of 10 answers are good ones")

"""A run whose rows share their beginnings is the run that computes each row alone: losses, evaluations, the adapter; on
several processes, after a stop in the middle, and in whatever way the base lies."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.recipe.file import load_recipe
from halfbyte.runs.folder import RunFolder
from halfbyte.training import preview
from tests import tiny_run
from tests.distributed.test_data_parallel import same, trained

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "cup", "box", "tree", "road"]
OFF = {"data__share_prefixes": "off"}
EVALUATED = {
    "lora__lora_dropout": 0.2, "data__eval": 4, "train__eval_strategy": "steps", "train__eval_steps": 2,
    "train__max_tokens_per_micro_batch": 90, "train__save_strategy": "steps", "train__save_steps": 2,
    "data__mask": "all", "train__max_steps": 4,
}  # fmt: skip


def rows(path: Path) -> None:
    """Two beginnings, some rows that go on from another, two that are equal."""
    draw = random.Random(3)
    beginnings = [" ".join(draw.choices(WORDS, k=14)) for _ in range(2)]
    texts = [f"{draw.choice(beginnings)} {' '.join(draw.choices(WORDS, k=draw.randint(1, 6)))}" for _ in range(14)]
    texts += [f"{texts[0]} {' '.join(draw.choices(WORDS, k=3))}" for _ in range(5)] + texts[:1]
    lines = [json.dumps({"prompt": text, "completion": draw.choice(WORDS)}) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(folder: Path, name: str, size: int = 1, **values: Any) -> RunFolder:
    if not (folder / "train.jsonl").exists():
        rows(folder / "train.jsonl")
    trained(folder, size, **values).path.rename(folder / name)
    return RunFolder(folder / name)


def test_the_run_is_that_of_rows_alone_on_any_number_of_processes_and_after_a_stop(tmp_path: Path) -> None:
    alone, shared = run(tmp_path, "off", **EVALUATED, **OFF), run(tmp_path, "auto", **EVALUATED)
    same(alone, shared)
    steps = [row for row in shared.read_metrics() if "loss" in row]
    assert all(row["computed_tokens"] < 0.8 * row["tokens"] for row in steps)
    assert not any("computed_tokens" in row for row in alone.read_metrics())
    report = json.loads(shared.report.read_text())
    assert report["computed_tokens"] == sum(row["computed_tokens"] for row in steps)
    assert abs(report["errors"]["computed_tokens"]) < 0.2
    planned = json.loads(shared.plan.read_text())
    assert planned["computed_tokens"] == report["planned"]["computed_tokens"] < planned["tokens"]
    same(shared, run(tmp_path, "three", 3, **EVALUATED))

    weights, adapter = shared.adapter / "adapter_model.safetensors", shared.adapter
    before = weights.read_bytes()
    shutil.rmtree(shared.checkpoints / "step-000004")
    shared.report.unlink()
    shutil.rmtree(adapter)
    finetune.train(load_recipe(shared.recipe, [f"output={shared.path}"]), resume=True)
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    "values",
    [
        {"quant__placement": "streamed", "train__gradient_checkpointing": True},
        {"quant__type": "int8", "quant__compute": "auto"},
    ],
    ids=["streamed, recomputed", "int8"],
)
def test_wherever_the_base_lies(values: dict[str, Any], tmp_path: Path) -> None:
    some = {"lora__lora_dropout": 0.0, "train__max_steps": 2, **values}
    same(run(tmp_path, "off", **some, **OFF), run(tmp_path, "auto", **some))


def test_data_check_says_what_is_shared_and_why_not(tmp_path: Path) -> None:
    rows(tmp_path / "train.jsonl")
    checked = preview.check(tiny_run.recipe(tmp_path)).to_json()["run"]
    assert checked["computed_tokens"] < 0.8 * checked["tokens"] and "begin alike" in checked["shared"]
    off = preview.check(tiny_run.recipe(tmp_path, **OFF)).to_json()["run"]
    assert off["computed_tokens"] == off["tokens"] and off["shared"].endswith("as the recipe says")
    tiny_run.rows(tmp_path / "train.jsonl")
    assert "begin differently" in preview.check(tiny_run.recipe(tmp_path)).to_json()["run"]["shared"]
    from tests import tiny

    shutil.rmtree(tmp_path / "model")
    alibi = tiny.model("falcon", vocab_size=tiny_run.VOCAB, changes={"alibi": True})
    alibi.save_pretrained(tmp_path / "model")
    tiny_run.tokenizer().save_pretrained(tmp_path / "model")
    assert "rows, not segments" in preview.check(tiny_run.recipe(tmp_path)).to_json()["run"]["shared"]

"""The main job by its commands, from rows to what other programs open. Each set of versions runs it (Makefile)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from halfbyte.runs.folder import RunFolder
from tests import tiny_run
from tests.in_process import runner


def test_a_run_from_its_rows_to_what_other_programs_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_run.rows(Path("test.jsonl"), n=5, seed=1)
    tiny_run.recipe(Path("."), data__eval="test.jsonl", train__save_strategy="steps", train__max_steps=2)
    command = runner(tmp_path, capsys)

    def halfbyte(line: str) -> str:
        ended = command(*line.split())
        assert ended.code == 0, f"{line}: {ended.out}{ended.err}"
        return ended.out

    halfbyte("train recipe.yaml --output run")
    halfbyte("train run --resume --set train.max_steps=4")
    assert [row["step"] for row in RunFolder(Path("run")).read_metrics() if "loss" in row] == [1, 2, 3, 4]
    scores = json.loads(halfbyte("eval run --base --json"))["metrics"]
    assert {side for score in scores for side in ("base", "adapter") if score.get(side)} == {"base", "adapter"}
    assert halfbyte("generate run -p red --max-new-tokens 4")
    halfbyte("verify run")
    halfbyte("export run --gguf F16 --base 16bit --out gguf")
    halfbyte("merge run --base 16bit --out merged")
    halfbyte("export run --peft --out peft")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(ids).logits
        base = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
        bare = base(ids).logits
        adapted = PeftModel.from_pretrained(base, "peft")(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, bare, rtol=1e-2, atol=1e-2)

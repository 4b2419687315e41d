"""The reference of a preference run: computed once, kept, the model of the beginning, read by a run that goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.errors import RunError
from halfbyte.objectives import preference
from halfbyte.runs.folder import RunFolder
from halfbyte.training.events import Listener
from halfbyte.training.prepare import prepare
from tests import pairs, tiny_run


def recipe(folder: Path, **values: Any) -> Any:
    folder.mkdir(exist_ok=True)
    kto = values.get("train__method") == "kto"
    if not (folder / "train.jsonl").exists():
        pairs.rows(folder / "train.jsonl", verdicts=kto)
    return tiny_run.recipe(folder, **{"train__method": "dpo", "train__learning_rate": 1e-2, **values})


def weights(loaded: Any) -> bytes:
    return (RunFolder(Path(loaded.recipe.output)).adapter / "adapter_model.safetensors").read_bytes()


class Notes(Listener):
    def __init__(self, stop_at: int = 0) -> None:
        self.of_reference: list[str] = []
        self.stop_at = stop_at

    def note(self, label: str, text: str) -> None:
        self.of_reference += [text] if label == "reference" else []

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_it_is_what_the_base_gives_each_answer(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, quant__type="none", data__eval=3)
    finetune.train(loaded)
    kept = json.loads((Path(loaded.recipe.output) / "reference.json").read_text())
    prepared = prepare(loaded.recipe)
    model = AutoModelForCausalLM.from_pretrained(loaded.recipe.model, dtype=torch.float32)
    for name, rows in (("train", prepared.train), ("eval", prepared.evaluation)):
        assert rows is not None and len(kept[name]) == len(rows.examples)
        for example, values in zip(rows.examples, kept[name], strict=True):
            for text, value in zip(example.texts, values, strict=True):
                ids, labels = torch.tensor([text.input_ids]), torch.tensor(text.labels)[1:]
                with torch.no_grad():
                    log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
                wanted = log_p[torch.arange(len(labels)), ids[0, 1:]][labels >= 0].sum()
                assert value == pytest.approx(float(wanted), rel=1e-5)


def test_a_run_from_an_adapter_has_it_as_its_reference(tmp_path: Path) -> None:
    first = tiny_run.recipe(tmp_path / "sft")
    finetune.train(first)
    loaded = recipe(tmp_path, lora__adapter=str(first.recipe.output), model=first.recipe.model)
    finetune.train(loaded)
    base = recipe(tmp_path, model=first.recipe.model, output=tmp_path / "base")
    finetune.train(base)
    rows, kept = [], []
    for each in (loaded, base):
        run = RunFolder(Path(each.recipe.output))
        rows.append(next(row for row in run.read_metrics() if "loss" in row))
        kept.append(json.loads(run.reference.read_text())["train"])
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-4) and kept[0] != kept[1]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_run_that_goes_on_reads_it_and_ends_in_the_same_bytes(method: str, tmp_path: Path) -> None:
    more = {"train__method": method, "lora__lora_dropout": 0.1, "train__max_tokens_per_micro_batch": 100}
    whole = recipe(tmp_path, output=tmp_path / "whole", **more)
    finetune.train(whole)
    loaded = recipe(tmp_path, **more)
    assert finetune.train(loaded, listener=Notes(2)).step == 2
    run = RunFolder(Path(loaded.recipe.output))
    before = run.reference.read_bytes()
    run.reference.unlink()
    with pytest.raises(RunError, match="the reference, the model that the run began with, is gone"):
        finetune.train(loaded, resume=True)
    run.reference.write_bytes(before.replace(b"0", b"1", 1))
    with pytest.raises(RunError, match="is not that of these rows"):
        finetune.train(loaded, resume=True)
    run.reference.write_bytes(before)
    again = Notes()
    finetune.train(loaded, resume=True, listener=again)
    assert "as they were kept" in again.of_reference[0] and run.reference.read_bytes() == before
    assert weights(loaded) == weights(whole)
    assert [row["loss"] for row in run.read_metrics()] == [
        row["loss"] for row in RunFolder(Path(whole.recipe.output)).read_metrics()
    ]


def test_without_it_the_losses_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that this file is about: rows whose reference is lost."""
    loaded = recipe(tmp_path)
    finetune.train(loaded)
    other = recipe(tmp_path, output=tmp_path / "other")
    real = preference.Preference.lay_out

    def forgetful(self: Any, *args: Any) -> Any:
        return {name: value for name, value in real(self, *args).items() if name != "reference"}

    monkeypatch.setattr(preference.Preference, "lay_out", forgetful)
    finetune.train(other)
    losses = [
        [r["loss"] for r in RunFolder(Path(x.recipe.output)).read_metrics() if "loss" in r] for x in (loaded, other)
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5) and abs(losses[0][-1] - losses[1][-1]) > 1e-3

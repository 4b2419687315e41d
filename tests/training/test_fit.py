"""A run as it is known before a weight is loaded: the same for a run, its dry run and `data check`; told in order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.errors import AdapterError, RecipeError
from halfbyte.plan import calibrate
from halfbyte.system import device
from halfbyte.training import fit, forecast, prepare, preview
from halfbyte.training.events import Listener
from halfbyte.training.fit import plan_run, with_plan
from halfbyte.training.prepare import look
from tests import tiny_run


class Notes(Listener):
    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def note(self, label: str, text: str) -> None:
        self.notes.append((label, text))


def test_it_knows_rows_targets_steps_and_plan_and_loads_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = [], fit.meta_model

    def spied(*args: Any, **kwargs: Any) -> Any:
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(fit, "meta_model", spied)
    recipe = tiny_run.recipe(tmp_path, train__max_steps=None, train__num_train_epochs=3).recipe
    job = plan_run(recipe, device.detect())
    assert len(job.prepared.train.examples) == 16
    (meta,) = made
    assert all(p.device.type == "meta" for p in meta.parameters())
    assert len(job.modules) == len(job.targets.names) * meta.config.num_hidden_layers
    assert job.job.steps == 12 and job.plan.trainable == job.job.trainable
    assert job.plan.to_json() == with_plan(look(recipe), job.machine).plan.to_json()


def test_every_caller_says_the_same(tmp_path: Path) -> None:
    """A run's notes and its plan.json, its dry run, and `data check`."""
    loaded = tiny_run.recipe(tmp_path, train__max_steps=None, train__num_train_epochs=2)
    heard, dry, seen = Notes(), preview.resolve(loaded), preview.check(loaded)
    plans = [dry.plan, seen.plan, preview.estimate(loaded).plan]  # before the first run here compiles its kernels
    outcome = finetune.train(loaded, listener=heard)
    said = [text for label, text in heard.notes if label == "data"]
    assert said[1:] == [text for label, text in dry.notes if label == "data"][1:]
    assert [f.line for f in seen.prepared.findings] == said[1:]
    assert seen.steps == outcome.step == outcome.report["planned"]["steps"] == 8
    assert len({(plan.peak_bytes, plan.max_tokens_per_micro_batch, plan.time.seconds) for plan in plans}) == 1
    planned, written = outcome.report["planned"], json.loads((outcome.run / "plan.json").read_text())
    assert planned["peak_rss_bytes"] == written["peak_bytes"] == dry.plan.peak_bytes
    assert planned["seconds"] == pytest.approx(dry.plan.time.seconds) and planned["train_seconds"] > 0
    (memory,) = (text for label, text in heard.notes if label == "plan" and text.startswith("memory "))
    assert f"at most {dry.plan.peak_bytes / 1e9:.2f} GB" in memory
    (adapters,) = (text for label, text in heard.notes if label == "adapters")
    assert f"{dry.plan.trainable:,} of " in adapters
    assert f"{dry.plan.trainable:,} parameters train" in dict(dry.notes)["adapters"]


def test_a_tokenizer_that_is_written_beside_the_adapter_is_planned(tmp_path: Path) -> None:
    outcome = finetune.train(tiny_run.recipe(tmp_path, data__chat_template="chatml"))
    line = next(line for line in outcome.report["lines"] if line["name"] == "adapter on disk")
    assert (outcome.run / "adapter" / "tokenizer.json").is_file()
    assert line["planned"] == pytest.approx(line["measured"], rel=0.2)  # a header, two configs, a template


def test_what_the_trainer_cannot_do_is_refused_before_the_rows_are_told(tmp_path: Path) -> None:
    heard = Notes()
    recipe = tiny_run.recipe(tmp_path, train__max_steps=1_000_001).recipe
    with pytest.raises(RecipeError, match=r"1,000,001 steps are more than"):
        plan_run(recipe, device.detect(), heard)
    assert heard.notes == []


def test_targets_that_match_nothing_are_refused_after_the_rows_are_told(tmp_path: Path) -> None:
    heard = Notes()
    recipe = tiny_run.recipe(tmp_path, lora__exclude_modules=["nowhere"]).recipe
    with pytest.raises(AdapterError, match="nowhere"):
        plan_run(recipe, device.detect(), heard)
    assert {label for label, _ in heard.notes} == {"data"}


@pytest.mark.parametrize("listens", [True, False])
def test_the_machine_is_calibrated_only_for_a_run(
    listens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(machine: object, dtype: str, say: object) -> None:
        asked.append(say is not None)

    monkeypatch.setattr(fit, "CALIBRATE_FROM_S", 0.0)
    monkeypatch.setattr(calibrate, "cached", lambda *_: None)
    monkeypatch.setattr(calibrate, "ensure", measured)
    plan_run(tiny_run.recipe(tmp_path).recipe, device.detect(), Notes() if listens else None)
    assert asked == [True] * listens


@pytest.mark.parametrize("listens", [True, False])
def test_kernels_are_compiled_beside_the_rows_and_there_before_the_plan(
    listens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def begin(missing: object, cores: int, dtype: str) -> Any:
        happened.append("begun")
        return lambda: happened.append("awaited")

    def told(*of: Any) -> Any:
        happened.append("rows")
        return prepare.prepare(*of)

    def jobs(*of: Any, **more: Any) -> Any:
        happened.append("job")
        return forecast.job_of(*of, **more)

    monkeypatch.setattr(fit.ahead, "begin", begin)
    monkeypatch.setattr(fit, "prepare", told)
    monkeypatch.setattr(fit, "job_of", jobs)
    monkeypatch.setattr(fit.kernel_cache, "uncompiled", lambda *_, **__: ("fp32", "bf16"))
    machine, heard = replace(device.detect(), cards=()), Notes()
    plan_run(tiny_run.recipe(tmp_path).recipe, machine, heard if listens else None)
    first = happened.index("job")
    assert happened[:first] == (["begun", "rows", "awaited"] if listens else ["rows"])
    assert any("compiling kernels, once" in text for _, text in heard.notes) == listens

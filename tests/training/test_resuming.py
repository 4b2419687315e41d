"""A run that goes on says from where, notices what has changed, and may be given more steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.errors import RunError
from halfbyte.recipe import fields
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Loaded, leaves
from halfbyte.runs import points
from halfbyte.runs.folder import RunFolder
from halfbyte.training.events import Listener
from halfbyte.training.trainer import StepTrainer
from tests import tiny_run

SAVED = {"train__save_strategy": "steps", "train__save_steps": 2}


class Heard(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, label: str, text: str) -> None:
        if label == "resume":
            self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def rates(run: RunFolder) -> list[float]:
    return [row["learning_rate"] for row in run.read_metrics() if "loss" in row]


def again(loaded: Loaded, *changes: str) -> tuple[finetune.Outcome, Heard]:
    heard, run = Heard(), RunFolder(Path(loaded.recipe.output))
    return finetune.train(load_recipe(run.recipe, changes), resume=True, listener=heard), heard


def test_the_tables_name_fields() -> None:
    known = {name for name, _ in leaves(load_recipe_of_defaults())}
    assert known > fields.MAY_CHANGE | fields.GOES_ON


def load_recipe_of_defaults() -> Any:
    from halfbyte.recipe.file import recipe_from

    return recipe_from("m", "rows.jsonl").recipe


def test_more_steps_go_on_with_a_schedule_over_all_of_them(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, **SAVED)
    finetune.train(loaded)
    run = RunFolder(Path(loaded.recipe.output))
    assert rates(run) == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    outcome, heard = again(loaded, "train.max_steps=8")
    assert heard.notes == [
        f"from step 4 of 8, {run.checkpoints}/step-000004",
        "train.max_steps 4 -> 8",
        "the linear learning rate is computed anew over 8 steps, from step 5 on",
    ]
    assert rates(run)[4:] == pytest.approx([5e-3, 3.75e-3, 2.5e-3, 1.25e-3])
    assert (outcome.step, outcome.report["steps"], load_recipe(run.recipe).recipe.train.max_steps) == (8, 8, 8)


def test_a_page_that_was_cut_off_is_made_where_the_finished_run_is_resumed(tmp_path: Path) -> None:
    """Its process was killed while it wrote the page, after the report: only resuming comes by again."""
    loaded = tiny_run.recipe(tmp_path)
    finetune.train(loaded)
    run = RunFolder(Path(loaded.recipe.output))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, running = (run.path / f".report.html.{pid}" for pid in (dead.pid, os.getppid()))
    for path in (left, running):
        path.write_text("<html>")
    os.utime(run.page, ns=(0, 0))
    assert finetune.train(loaded, resume=True).step == 4
    made = run.page.stat().st_mtime_ns
    assert made >= run.report.stat().st_mtime_ns and not left.exists() and running.exists()
    assert finetune.train(loaded, resume=True).step == 4 and run.page.stat().st_mtime_ns == made


def test_a_run_that_another_process_writes_keeps_its_recipe(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, **SAVED)
    finetune.train(loaded)
    run = RunFolder(Path(loaded.recipe.output))
    before = run.recipe.read_bytes()
    with run.lock(), pytest.raises(RunError, match="is being written"):
        again(loaded, "train.max_steps=8")
    assert run.recipe.read_bytes() == before
    again(loaded, "train.max_steps=8")
    assert run.recipe.read_bytes() != before


def test_more_epochs_take_the_rows_that_a_longer_run_takes(tmp_path: Path) -> None:
    """Under a constant rate a run of one epoch and one more ends in the bytes of a run of two."""
    common = {**SAVED, "train__max_steps": None, "train__lr_scheduler_type": "constant", "lora__lora_dropout": 0.1}
    two = tiny_run.recipe(tmp_path, **common, train__num_train_epochs=2, output=tmp_path / "two")
    finetune.train(two)
    one = tiny_run.recipe(tmp_path, **common, train__num_train_epochs=1)
    finetune.train(one)
    outcome, _ = again(one, "train.num_train_epochs=2")
    assert outcome.step == 8
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_changes_no_step_may_change_and_is_used(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, **SAVED)
    finetune.train(loaded)
    run = RunFolder(Path(loaded.recipe.output))
    wanted = (run.adapter / "adapter_model.safetensors").read_bytes()
    rows = Path(loaded.recipe.data.train).rename(tmp_path / "elsewhere.jsonl")  # type: ignore[arg-type]
    run.report.unlink()
    for file in (run.checkpoints / "step-000004").iterdir():
        file.unlink()
    _, heard = again(loaded, f"data.train={rows}", "train.save_total_limit=1", "quant.placement=mapped")
    assert heard.notes[0].startswith("from step 2 of 4, ")
    assert heard.warnings == [
        "checkpoint step-000004 (manifest.json cannot be read) is damaged and passed over; going on from step 2"
    ]
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == wanted
    assert [path.name for path in points.checkpoints(run.checkpoints)] == ["step-000004"]
    assert json.loads(run.report.read_text())["notices"][0].startswith("checkpoint step-000004 (")
    now = load_recipe(run.recipe).recipe
    assert (now.train.save_total_limit, now.quant.placement, now.data.train) == (1, "mapped", str(rows))


class Twice(Listener):
    """Interrupts twice in a step."""

    def __init__(self, at: int) -> None:
        self.at, self.heard = at, list[signal.Signals]()

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)
            assert self.heard == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)

    def stopping(self, signal: signal.Signals) -> None:
        self.heard.append(signal)


@pytest.mark.parametrize(("at", "saved"), [(3, 2), (1, 0)])
def test_a_second_interrupt_stops_at_once_and_leaves_the_last_checkpoint(at: int, saved: int, tmp_path: Path) -> None:
    whole = tiny_run.recipe(tmp_path, **SAVED, output=tmp_path / "whole")
    finetune.train(whole)
    loaded = tiny_run.recipe(tmp_path, **SAVED)
    outcome = finetune.train(loaded, listener=Twice(at))
    assert (outcome.stopped_by, outcome.at_once, outcome.step) == (signal.SIGINT, True, saved)
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in run.checkpoints.iterdir()] == [f"step-{saved:06d}"] * bool(saved)
    if saved:
        finetune.train(loaded, resume=True)
        name = "adapter/adapter_model.safetensors"
        assert (run.path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Leaves(Listener):
    """Interrupts in an evaluation."""

    def __init__(self) -> None:
        self.evaluations, self.rows = 0, list[dict[str, Any]]()

    def evaluating(self) -> None:
        self.evaluations += 1
        if self.evaluations == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def evaluated(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def test_an_interrupt_leaves_an_evaluation_and_resume_makes_it(tmp_path: Path) -> None:
    asked = {"data__eval": str(tiny_run.rows(tmp_path / "held.jsonl", n=6, seed=5)), "train__eval_strategy": "steps"}
    asked |= {"train__eval_steps": 2, "train__save_strategy": "no", "train__save_minutes": 60.0}
    whole = tiny_run.recipe(tmp_path, **asked, output=tmp_path / "whole")
    finetune.train(whole)
    loaded, left = tiny_run.recipe(tmp_path, **asked), Leaves()
    outcome = finetune.train(loaded, listener=left)
    assert (outcome.stopped_by, outcome.at_once, outcome.step, left.rows) == (signal.SIGINT, False, 2, [])
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000002"]
    finetune.train(loaded, resume=True)

    def evaluations(folder: Path) -> list[tuple[int, float]]:
        return [(row["step"], row["eval_loss"]) for row in RunFolder(folder).read_metrics() if "eval_loss" in row]

    assert evaluations(run.path) == evaluations(tmp_path / "whole") and len(evaluations(run.path)) == 2
    name = "adapter/adapter_model.safetensors"
    assert (run.path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_checkpoint_with_changed_bytes_is_written_again(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, **SAVED)
    finetune.train(loaded)
    run = RunFolder(Path(loaded.recipe.output))
    run.report.unlink()
    file = run.checkpoints / "step-000004" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    _, heard = again(loaded)
    assert "optimizer.safetensors has another sha256" in heard.warnings[0]
    assert points.damage(run.checkpoints / "step-000004", hashes=True) is None


class InMicroBatch(Listener):
    """Ends the run in the middle of a step."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, label: str, text: str) -> None:
        if label == "resume":
            self.notes.append(text)


@pytest.mark.parametrize(("number", "step"), [(2, 0), (6, 1), (15, 3)])
def test_a_signal_ends_a_step_between_two_micro_batches(
    number: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro-batches a step: what of the step was done is done again, with the same dropout."""
    asked = {**SAVED, "lora__lora_dropout": 0.2, "train__max_tokens_per_micro_batch": 16, "train__save_steps": 100}
    whole = tiny_run.recipe(tmp_path, **asked, output=tmp_path / "whole")
    finetune.train(whole)
    loaded = tiny_run.recipe(tmp_path, **asked)
    real, seen = StepTrainer._run_micro_batch, [0]

    def counted(self: StepTrainer, *args: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StepTrainer, "_run_micro_batch", counted)
        outcome = finetune.train(loaded)
    assert (outcome.stopped_by, outcome.at_once, outcome.step) == (signal.SIGTERM, False, step)
    assert seen[0] == number, "the step ended with its micro-batch"
    run, heard = RunFolder(tmp_path / "run"), InMicroBatch()
    assert [p.name for p in points.checkpoints(run.checkpoints)] == [f"step-{step:06d}"] * bool(step)
    finetune.train(loaded, resume=True, listener=heard)
    began = f"from step {step} of 4, {run.checkpoints}/step-{step:06d}"
    assert heard.notes == [began if step else "from the beginning: the run was ended before its first checkpoint"]
    name = "adapter/adapter_model.safetensors"
    assert (run.path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row["loss"] for row in run.read_metrics()] == [
        row["loss"] for row in RunFolder(tmp_path / "whole").read_metrics()
    ]
